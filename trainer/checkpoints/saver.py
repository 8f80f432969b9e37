"""Checkpoints are written beside the training, and appear whole or not at all.

The loop stops only to copy its state into host memory (:mod:`amlaunch.trainer.checkpoints.host_copy`).
A thread then writes torch.distributed.checkpoint's files into ``step-N.tmp/``,
hashes them, and meets the threads of the other ranks in a process group of
their own: only when all have written everything is the manifest made, the
folder renamed to ``step-N``, and ``latest`` names it. Whoever fails says so
there, and all ranks come to the same verdict.
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.tensor import DTensor

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import Lock, fsync_folder, read_object, sha256_file, write_json, write_text
from amlaunch.recipes.format.schema import Checkpoint
from amlaunch.recipes.version import VERSION
from amlaunch.trainer.checkpoints.checkpoint import (
    BEST,
    LATEST,
    MANIFEST,
    META,
    MODEL,
    RECIPE,
    SAFETENSORS,
    VALIDATED,
    Optimizers,
    Whole,
    by_validation,
    causes,
    discard,
    folder_of,
    listed,
    state_of,
    step_of,
)  # fmt: skip
from amlaunch.trainer.checkpoints.host_copy import Staging, on_device
from amlaunch.trainer.parallel.world import World

T = TypeVar("T")
GROUP_TIMEOUT = timedelta(hours=2)
"""How long the fastest rank's files may wait for those of the slowest."""
CONSOLIDATED = "consolidated"
LOCK = "lock"
LOCK_PATIENCE, LOCK_PATIENCE_HERE = 120.0, 3.0
"""Seconds that a lock is waited for. A network file system keeps that of a crashed host for a while, and a killed process of
this one may still be ending."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class SaveFailed(Exception):
    """A checkpoint could not be written, and all ranks know why."""


@dataclass(frozen=True)
class Outcome:
    """How one save ended, the same on all ranks."""

    step: int
    folder: Path
    seconds: float
    """From the copy to the last rename."""
    waited: float
    """Of these, how long the loop stood still."""
    error: str | None = None


class Saver:
    """Writes the checkpoints of a run into ``root``, which it holds alone, one at a time."""

    def __init__(
        self,
        root: Path,
        section: Checkpoint,
        world: World,
        recipe_text: str,
        consolidate: Callable[[Whole, Path], None],
    ):
        self.root = root
        self.saved = 0
        """The step of the newest checkpoint that is whole."""
        self._section = section
        self._world = world
        self._recipe_text = recipe_text
        self._consolidate = consolidate
        self._staging = Staging(world.device)
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self.last: Outcome | None = None
        """How the newest save that has ended did so."""
        self._lock = Lock(root / LOCK)
        problem = world.broadcast(self._open() if world.is_main else None)
        if problem:
            raise BadInput(f"{root}: {problem}")
        self._group = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)

    def _open(self) -> str | None:
        """Make the folder, lock it, and delete what an interrupted save or clean-up left in it; what is wrong, if anything."""
        advice = "name another folder, or checkpoint.enabled false"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            other = _take(self._lock)
            if other:
                return f"{other} writes its checkpoints there; {advice}"
            for path in (*self.root.glob("step-*.tmp"), *self.root.glob(".*.tmp")):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            probe = self.root / "step-probe.tmp"
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            return f"checkpoints cannot be written there ({error.strerror}); {advice}"
        return None

    def reserve(self, model: nn.Module, optimizers: Optimizers) -> None:
        """Have the memory for a copy of the state ready when it is needed."""
        if self._section.is_async:
            self._staging.reserve(owned(state_of(model, optimizers), self._world.rank, self._world.size))

    def save(self, step: int, model: nn.Module, optimizers: Optimizers, meta: Mapping[str, Any]) -> None:
        """Begin to write the checkpoint after ``step`` steps; the one before has ended (:meth:`wait`)."""
        began = time.perf_counter()
        state = owned(state_of(model, optimizers), self._world.rank, self._world.size)
        if self._section.is_async:
            state = self._staging.copy(state)
        full = {"step": step, **meta, "format": self._section.model_save_format, **_versions(self._world)}
        self._thread = threading.Thread(
            target=self._run, args=(step, state, full, began), name="checkpoint", daemon=True
        )
        self._thread.start()
        self._waited = time.perf_counter() - began
        if not self._section.is_async:
            self._thread.join()
            self._waited = time.perf_counter() - began

    def ended(self) -> Outcome | None:
        """How the save ended that was begun last; None while it goes on, and once it has been told."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread = None
        if self._outcome is None:
            return None
        self.last, self._outcome = replace(self._outcome, waited=self._waited), None
        if self.last.error is None:
            self.saved = self.last.step
        return self.last

    def wait(self, beat: Callable[[], None] = lambda: None) -> Outcome | None:
        """:meth:`ended`, when it has; ``beat`` is called now and then."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(1.0)
            beat()
        return self.ended()

    def validated(self, step: int, loss: float) -> None:
        """The validation after ``step``, of which the checkpoint was already there: a stop had come between the two."""
        if not self._world.is_main or step != self.saved:
            return
        try:
            write_json(folder_of(self.root, step) / VALIDATED, {"val_loss": loss})
            self._name_best()
        except OSError as error:
            print(
                f"warning: {self.root}: the validation loss of step {step} could not be noted ({error}); it is not taken for the best",
                flush=True,
            )

    def close(self) -> None:
        """Give the folder back. What is still being written is not waited for: other ranks may be gone."""
        self._lock.release()

    # The rest runs in the thread.

    def _run(self, step: int, state: dict[str, Any], meta: dict[str, Any], began: float) -> None:
        on_device(self._world.device)
        temp = self.root / f"step-{step:08d}.tmp"
        error = None
        try:
            self._write(temp, state, meta)
        except (SaveFailed, dcp.CheckpointException) as failed:
            error = causes(failed) if isinstance(failed, dcp.CheckpointException) else str(failed)
        except BaseException as failed:  # the other ranks are gone, say: their silence ends the training soon enough
            error = f"rank {self._world.rank}: {causes(failed)}"
        if error is not None and self._world.is_main:
            shutil.rmtree(temp, ignore_errors=True)
        self._outcome = Outcome(step, folder_of(self.root, step), time.perf_counter() - began, 0.0, error)

    def _write(self, temp: Path, state: dict[str, Any], meta: dict[str, Any]) -> None:
        self._staging.wait()
        self._together(lambda: _fresh(temp) if self._world.is_main else None)
        if self._section.model_save_format == SAFETENSORS:
            writer = dcp.HuggingFaceStorageWriter(path=str(temp / MODEL), save_distributed=True)
            dcp.save(state["model"], storage_writer=writer, process_group=self._group)
            state = {"optimizer": state["optimizer"]}
        dcp.save(state, storage_writer=dcp.FileSystemWriter(temp), process_group=self._group)
        if self._section.save_consolidated:
            self._together(
                lambda: self._consolidate(Whole(temp, meta), temp / CONSOLIDATED) if self._world.is_main else None
            )
        parts = self._together(lambda: self._described(temp, meta))
        manifest = {name: entry for part in parts for name, entry in part.items()}
        self._together(lambda: self._publish(temp, int(meta["step"]), manifest) if self._world.is_main else None)

    def _described(self, temp: Path, meta: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """This rank's part of the manifest, once rank 0 has added what is not a tensor."""
        if self._world.is_main:
            (temp / META).write_text(json.dumps(meta, indent=2) + "\n")
            (temp / RECIPE).write_text(self._recipe_text)
        return _entries(temp, self._world.rank)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` returns on every rank, when all are done with it. Raises SaveFailed on all where one fails."""
        try:
            mine: tuple[T | None, str | None] = (work(), None)
        except Exception as error:
            mine = (None, causes(error))
        everyone: list[Any] = [None] * self._world.size
        dist.all_gather_object(everyone, mine, group=self._group)
        wrong = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(everyone) if error]
        if wrong:
            raise SaveFailed("; ".join(wrong))
        return [value for value, _ in everyone]

    def _publish(self, temp: Path, step: int, manifest: dict[str, Any]) -> None:
        """Make ``temp`` a checkpoint, in one step that a crash cannot halve; then the pointers, then make room."""
        write_json(temp / MANIFEST, manifest)
        for folder in (temp, *(path for path in temp.rglob("*") if path.is_dir())):
            fsync_folder(folder)
        final = folder_of(self.root, step)
        if final.exists():  # damaged, or it would have been resumed from
            discard(final)
        os.rename(temp, final)
        fsync_folder(self.root)
        write_text(self.root / LATEST, final.name + "\n")
        self._name_best()
        for folder in superfluous(self.root, self._section):
            discard(folder)

    def _name_best(self) -> None:
        best = by_validation(self.root)
        if best and self._section.keep_best:
            write_text(self.root / BEST, best[0].name + "\n")


def owned(state: Mapping[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """The part of a state dict (of two levels) that ``rank`` writes: its shards, and its share of what all ranks have whole.

    So DDP's ranks copy and write a part each, instead of everything.
    """
    whole = {(part, name): value for part, values in state.items() for name, value in values.items() if is_whole(value)}
    load = [0] * ranks
    owner = {}
    for place in sorted(whole, key=lambda place: (-whole[place].nbytes, place)):
        owner[place] = load.index(min(load))
        load[owner[place]] += whole[place].nbytes + 1
    return {
        part: {name: value for name, value in values.items() if owner.get((part, name), rank) == rank}
        for part, values in state.items()
    }


def is_whole(value: Any) -> bool:
    """Whether a value of a state dict is a tensor that every rank has whole."""
    return isinstance(value, torch.Tensor) and not isinstance(value, DTensor)


def superfluous(root: Path, section: Checkpoint) -> list[Path]:
    """What need not be kept: neither among the newest, nor the best, nor one of every so many steps; and what was set aside."""
    folders = listed(root)
    kept = {*folders[: section.max_recent_checkpoints], *(by_validation(root)[:1] if section.keep_best else ())}
    if section.keep_every_steps:
        kept |= {folder for folder in folders if step_of(folder) % section.keep_every_steps == 0}
    return [
        folder
        for folder in (*folders, *root.glob("step-*.damaged"), *root.glob("step-*.replaced"))
        if folder not in kept
    ]


def _take(lock: Lock) -> str | None:
    """Take the lock and say so in it; who has it, where another does."""
    began = time.monotonic()
    me = {"host": platform.node(), "pid": os.getpid()}
    said = False
    while not _acquired(lock):
        holder = read_object(lock.path)
        here = holder.get("host") in (None, me["host"])
        if time.monotonic() - began > (LOCK_PATIENCE_HERE if here else LOCK_PATIENCE):
            return f"another run (process {holder.get('pid', 'unknown')} on {holder.get('host', 'some host')})"
        if not said and not here:
            print(f"waiting for {lock.path}, which a process on {holder['host']} holds", flush=True)
            said = True
        time.sleep(0.5)
    if not lock.held:
        return None
    os.ftruncate(lock.fileno(), 0)
    os.pwrite(lock.fileno(), (json.dumps(me) + "\n").encode(), 0)
    return None


def _acquired(lock: Lock) -> bool:
    """Whether the lock is ours, or the file system has none: then nobody can be kept out."""
    try:
        return lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"warning: {lock.path}: this file system has no locks ({error.strerror}); see to it that one run alone writes there",
            flush=True,
        )
        return True


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _versions(world: World) -> dict[str, Any]:
    return {
        "world_size": world.size,
        "amlaunch": VERSION,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _entries(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and digest of the files that ``rank`` wrote, so that hashing is spread as writing was; they are durable then."""
    mine = [path for path in sorted(folder.rglob("*")) if path.is_file() and _writer(path.name) == rank]
    return {
        path.relative_to(folder).as_posix(): {"bytes": _synced_size(path), "sha256": sha256_file(path)} for path in mine
    }


def _synced_size(path: Path) -> int:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())
        return os.fstat(handle.fileno()).st_size


def _writer(name: str) -> int:
    """torch names a rank's files ``__<rank>_<n>.distcp`` and ``shard-<rank + 1>-…``; the rest is rank 0's."""
    match = re.match(r"__(\d+)_|shard-(\d+)-", name)
    if match is None:
        return 0
    return int(match[1]) if match[1] else int(match[2]) - 1
