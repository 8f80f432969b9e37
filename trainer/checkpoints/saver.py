"""Write checkpoints in the background while training continues.

The loop stops only to copy its state into host memory
(:mod:`amlaunch.trainer.checkpoints.host_copy`). A thread then writes the files
of torch.distributed.checkpoint into ``step-N.tmp/``, hashes them, and meets the
threads of the other ranks in a separate process group. After all ranks have
written everything, rank 0 writes the manifest, renames the folder to ``step-N``
and updates ``latest``. A rank that fails reports it to the others, so that all
ranks agree on the outcome.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor

from amlaunch.recipes.checkpoint_folders import (
    BEST,
    LATEST,
    MANIFEST,
    META,
    VALIDATION,
    expired_checkpoints,
    list_by_validation_loss,
)
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import Lock, fsync_folder, read_object, sha256_file, write_json, write_text
from amlaunch.recipes.format.schema import Checkpoint
from amlaunch.recipes.version import VERSION
from amlaunch.trainer.checkpoints.checkpoint import (
    MODEL,
    RECIPE,
    SAFETENSORS,
    StoredCheckpoint,
    checkpoint_folder,
    delete_checkpoint,
    describe_error,
    may_pass,
    training_state_dict,
)
from amlaunch.trainer.checkpoints.hf_folder import save_tensors
from amlaunch.trainer.checkpoints.host_copy import HostCopy, set_thread_device
from amlaunch.trainer.parallel.world import World
from amlaunch.trainer.torch_features import safetensors_writer

T = TypeVar("T")
GROUP_TIMEOUT = timedelta(hours=2)
"""Maximum time that the fastest rank waits for the files of the slowest."""
CONSOLIDATED = "consolidated"
LOCK = "lock"
REMOTE_LOCK_SECONDS, LOCAL_LOCK_SECONDS = 120.0, 3.0
"""How long to wait for a lock held by another host, or by a process of this host.

A network file system keeps the lock of a crashed host for a while, and a killed local process may still be exiting.
"""
LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class SaveFailed(Exception):
    """A checkpoint could not be written; raised on all ranks."""

    def __init__(self, message: str, recurs: bool):
        super().__init__(message)
        self.recurs = recurs
        """True if the next save will fail for the same reason (:func:`may_pass`)."""


@dataclass(frozen=True)
class SaveOutcome:
    """Outcome of one save, the same on all ranks."""

    step: int
    folder: Path
    seconds: float
    """Time from the copy to the last rename."""
    blocked_seconds: float
    """Time during which the loop stood still."""
    error: str | None = None
    """Why the checkpoint, or only its consolidated folder, could not be written."""
    recurs: bool = False
    """True if the next save will fail for the same reason."""
    is_saved: bool = True
    """True if training can resume from this checkpoint; it may still lack its consolidated folder."""


class Saver:
    """Writes the checkpoints of a run into ``root``, one at a time, and locks that folder against other runs."""

    def __init__(
        self,
        root: Path,
        section: Checkpoint,
        world: World,
        recipe_text: str,
        consolidate: Callable[[StoredCheckpoint, Path], None],
    ):
        self.root = root
        self.saved_step = 0
        """Step of the newest complete checkpoint; 0 if there is none."""
        self.last_outcome: SaveOutcome | None = None
        """Outcome of the newest save that has ended."""
        self._section = section
        self._world = world
        self._recipe_text = recipe_text
        self._consolidate = consolidate
        self._host_copy = HostCopy(world.device)
        self._thread: threading.Thread | None = None
        self._outcome: SaveOutcome | None = None
        self._blocked_seconds = 0.0
        self._lock = Lock(root / LOCK)
        problem = world.broadcast(self._open() if world.is_main else None)
        if problem:
            raise BadInput(f"{root}: {problem}")
        self._group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        self._try_format()

    def _open(self) -> str | None:
        """Create and lock the folder and delete leftovers of interrupted saves; return the problem, if any."""
        advice = "Use another --checkpoints folder, or set checkpoint.enabled to false"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            holder = _acquire_lock(self._lock)
            if holder:
                return f"{holder} is writing checkpoints here. {advice}"
            for path in (*self.root.glob("step-*.tmp"), *self.root.glob(".*.tmp")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            probe = self.root / "step-probe.tmp"
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            return f"checkpoints cannot be written here ({error.strerror}). {advice}"
        return None

    def _try_format(self) -> None:
        """Write one number per rank in the recipe's format. Raises BadInput on all ranks if that cannot work."""
        temp = self.root / "step-trial.tmp"
        tensors = {f"rank{self._world.rank}": torch.zeros(1)}
        try:
            self._on_main(lambda: _recreate(temp))
            self._write_state(temp, {"model": tensors, "optimizer": tensors})
            if self._section.save_consolidated:
                self._on_main(lambda: save_tensors(temp, tensors))
        except BadInput:
            raise
        except (Exception, dcp.CheckpointException) as error:
            problem = str(error) if isinstance(error, SaveFailed) else describe_error(error)
            raise BadInput(
                f"{self.root}: checkpoints cannot be written here: {problem}. Fix the cause, set "
                "checkpoint.model_save_format: torch_save with save_consolidated: false, or use another folder"
            ) from error
        finally:
            if self._world.is_main:
                shutil.rmtree(temp, ignore_errors=True)

    def reserve(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Allocate the memory for a copy of the state in the background."""
        if self._section.is_async:
            self._host_copy.reserve(self._owned_state(model, optimizers))

    def save(
        self, step: int, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], meta: Mapping[str, Any]
    ) -> None:
        """Start writing the checkpoint of ``step``; the previous save must have ended (:meth:`wait`)."""
        started = time.perf_counter()
        state = self._owned_state(model, optimizers)
        if self._section.is_async:
            state = self._host_copy.copy(state)
        full_meta = {"step": step, **meta, "format": self._section.model_save_format, **_versions(self._world)}
        self._thread = threading.Thread(
            target=self._run, args=(step, state, full_meta, started), name="checkpoint", daemon=True
        )
        self._thread.start()
        self._blocked_seconds = time.perf_counter() - started
        if not self._section.is_async:
            self._thread.join()
            self._blocked_seconds = time.perf_counter() - started

    def _owned_state(self, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
        return owned_by_rank(training_state_dict(model, optimizers), self._world.rank, self._world.size)

    def poll(self) -> SaveOutcome | None:
        """Return the outcome of the current save, once; None while it runs and afterwards."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread = None
        if self._outcome is None:
            return None
        self.last_outcome = replace(self._outcome, blocked_seconds=self._blocked_seconds)
        self._outcome = None
        if self.last_outcome.is_saved:
            self.saved_step = self.last_outcome.step
        return self.last_outcome

    def wait(self, beat: Callable[[], None] = lambda: None) -> SaveOutcome | None:
        """Wait for the current save and return :meth:`poll`; ``beat`` is called about once a second."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(1.0)
            beat()
        return self.poll()

    def record_validation(self, step: int, loss: float) -> None:
        """Store the validation loss of ``step`` if its checkpoint was saved first, before a stop."""
        if not self._world.is_main or step != self.saved_step:
            return
        try:
            write_json(checkpoint_folder(self.root, step) / VALIDATION, {"val_loss": loss})
            self._update_best()
        except OSError as error:
            print(
                f"warning: {self.root}: cannot record the validation loss of step {step} ({error}); "
                "this step will not be considered for the best checkpoint",
                flush=True,
            )

    def close(self) -> None:
        """Release the folder without waiting for a save in progress, because other ranks may be gone."""
        self._lock.release()

    # The methods below run in the thread.

    def _run(self, step: int, state: dict[str, Any], meta: dict[str, Any], started: float) -> None:
        set_thread_device(self._world.device)
        temp = self.root / f"step-{step:08d}.tmp"
        failure, is_saved = None, False
        try:
            failure = self._write(temp, state, meta)
            is_saved = True
        except SaveFailed as error:
            failure = error
        except dcp.CheckpointException as error:
            failure = SaveFailed(describe_error(error), not may_pass(error))
        except BaseException as error:
            # for example, the other ranks are gone; their silence soon ends the training, too
            failure = SaveFailed(f"rank {self._world.rank}: {describe_error(error)}", not may_pass(error))
        if not is_saved and self._world.is_main:
            shutil.rmtree(temp, ignore_errors=True)
        outcome = SaveOutcome(step, checkpoint_folder(self.root, step), time.perf_counter() - started, 0.0)
        if failure is not None:
            outcome = replace(outcome, error=str(failure), recurs=failure.recurs, is_saved=is_saved)
        self._outcome = outcome

    def _write(self, temp: Path, state: dict[str, Any], meta: dict[str, Any]) -> SaveFailed | None:
        """Write and publish a checkpoint; return why it lacks the consolidated folder, if it does."""
        self._host_copy.wait()
        self._on_main(lambda: _recreate(temp))
        self._write_state(temp, state)
        failure = None
        if self._section.save_consolidated:
            try:
                self._on_main(lambda: self._consolidate(StoredCheckpoint(temp, meta), temp / CONSOLIDATED))
            except SaveFailed as error:
                failure = error

        entries_of_ranks = self._on_all_ranks(lambda: self._manifest_entries(temp, meta))
        manifest = {name: entry for entries in entries_of_ranks for name, entry in entries.items()}
        self._on_main(lambda: self._publish(temp, int(meta["step"]), manifest))
        return failure

    def _write_state(self, temp: Path, state: dict[str, Any]) -> None:
        """Write model and optimizer in the recipe's format."""
        if self._section.model_save_format == SAFETENSORS:
            writer = safetensors_writer(temp / MODEL)
            dcp.save(state["model"], storage_writer=writer, process_group=self._group)
            state = {"optimizer": state["optimizer"]}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(temp), process_group=self._group)

    def _manifest_entries(self, temp: Path, meta: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return this rank's manifest entries; rank 0 first writes the files that hold no tensors."""
        if self._world.is_main:
            (temp / META).write_text(json.dumps(meta, indent=2) + "\n")
            (temp / RECIPE).write_text(self._recipe_text)
        return _entries_of_rank(temp, self._world.rank)

    def _on_main(self, work: Callable[[], None]) -> None:
        """Run ``work`` on rank 0 and wait for it on all ranks. Raises SaveFailed on all ranks if it fails."""
        self._on_all_ranks(lambda: work() if self._world.is_main else None)

    def _on_all_ranks(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` on every rank and return all results. Raises SaveFailed on all ranks if one fails."""
        try:
            result: tuple[T | None, str | None, bool] = (work(), None, False)
        except Exception as error:
            result = (None, describe_error(error), not may_pass(error))
        results: list[Any] = [None] * self._world.size
        dist.all_gather_object(results, result, group=self._group)
        errors = [f"rank {rank}: {error}" for rank, (_, error, _) in enumerate(results) if error]
        if errors:
            raise SaveFailed("; ".join(errors), any(recurs for _, _, recurs in results))
        return [value for value, _, _ in results]

    def _publish(self, temp: Path, step: int, manifest: dict[str, Any]) -> None:
        """Turn ``temp`` into a checkpoint with one atomic rename, update the pointers, and delete expired ones."""
        write_json(temp / MANIFEST, manifest)
        for folder in (temp, *(path for path in temp.rglob("*") if path.is_dir())):
            fsync_folder(folder)
        final = checkpoint_folder(self.root, step)
        # an existing folder must be damaged, or the run would have resumed from it
        if final.exists():
            delete_checkpoint(final)
        os.rename(temp, final)
        fsync_folder(self.root)
        write_text(self.root / LATEST, final.name + "\n")
        self._update_best()
        for folder in expired_checkpoints(self.root, self._section):
            delete_checkpoint(folder)

    def _update_best(self) -> None:
        folders = list_by_validation_loss(self.root)
        if folders and self._section.keep_best:
            write_text(self.root / BEST, folders[0].name + "\n")


def owned_by_rank(state: Mapping[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """Return the part of a two-level state dict that ``rank`` writes.

    That is its own shards and its share of the replicated tensors, so that DDP's
    ranks each copy and write a share instead of everything.
    """
    replicated = {
        (section, name): value
        for section, values in state.items()
        for name, value in values.items()
        if is_replicated(value)
    }
    load = [0] * ranks
    owner = {}
    for key in sorted(replicated, key=lambda key: (-replicated[key].nbytes, key)):
        owner[key] = load.index(min(load))
        load[owner[key]] += replicated[key].nbytes + 1
    return {
        section: {name: value for name, value in values.items() if owner.get((section, name), rank) == rank}
        for section, values in state.items()
    }


def is_replicated(value: Any) -> bool:
    """Return True if ``value`` is a tensor that every rank holds in full."""
    return isinstance(value, torch.Tensor) and not isinstance(value, DTensor)


# --- the lock -------------------------------------------------------------------------------------


def _acquire_lock(lock: Lock) -> str | None:
    """Acquire the lock and write this process into it; return a description of the holder if another has it."""
    started = time.monotonic()
    this_process = {"host": platform.node(), "pid": os.getpid()}
    is_announced = False
    while not _try_acquire(lock):
        holder = read_object(lock.path)
        is_local = holder.get("host") in (None, this_process["host"])
        if time.monotonic() - started > (LOCAL_LOCK_SECONDS if is_local else REMOTE_LOCK_SECONDS):
            return f"another run (process {holder.get('pid', 'unknown')} on {holder.get('host', 'an unknown host')})"
        if not is_announced and not is_local:
            print(f"waiting for {lock.path}: locked by a process on {holder['host']}", flush=True)
            is_announced = True
        time.sleep(0.5)
    if not lock.held:
        return None
    os.ftruncate(lock.fileno(), 0)
    os.pwrite(lock.fileno(), (json.dumps(this_process) + "\n").encode(), 0)
    return None


def _try_acquire(lock: Lock) -> bool:
    """Return True if the lock is ours, or if the file system supports no locks."""
    try:
        return lock.acquire()
    except OSError as error:
        if error.errno not in LOCKS_UNSUPPORTED:
            raise
        print(
            f"warning: {lock.path}: this file system does not support locks ({error.strerror}). "
            "Make sure that only one run writes to this folder",
            flush=True,
        )
        return True


# --- files ----------------------------------------------------------------------------------------


def _recreate(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _versions(world: World) -> dict[str, Any]:
    return {
        "world_size": world.size,
        "amlaunch": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _entries_of_rank(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Flush the files that ``rank`` wrote to disk; return their sizes and digests.

    Each rank hashes its own files, so that hashing is spread like writing.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and _writer_rank(path.name) == rank]
    return {
        path.relative_to(folder).as_posix(): {"bytes": _flushed_size(path), "sha256": sha256_file(path)}
        for path in paths
    }


def _flushed_size(path: Path) -> int:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
        return os.fstat(handle.fileno()).st_size


def _writer_rank(name: str) -> int:
    """Return the rank that wrote a file.

    torch names a rank's files ``__<rank>_<n>.distcp`` and ``shard-<rank + 1>-…``; all others are rank 0's.
    """
    match = re.match(r"__(\d+)_|shard-(\d+)-", name)
    if match is None:
        return 0
    return int(match[1]) if match[1] else int(match[2]) - 1
