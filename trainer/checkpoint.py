"""Checkpoints that exist whole or not at all.

A save goes into ``step-N.tmp/``: torch.distributed.checkpoint's files, then
``meta.json``, then ``manifest.json`` with the size and sha256 of each; only
then is the folder renamed to ``step-N``, and ``latest`` names it. Loading checks
every byte first: torch itself notices a truncated file, but loads one with
flipped bytes without a word.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from recipes.errors import BadInput
from recipes.files import fsync_folder, read_json, sha256_file, write_json, write_text
from recipes.version import VERSION
from trainer.errors import TrainingFailed
from trainer.parallel import World

META = "meta.json"
MANIFEST = "manifest.json"
LATEST = "latest"
NAME = re.compile(r"step-(\d{8,})")
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
"""Optimizer state under each parameter's own name: independent of groups and of how it was sharded."""


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to; another model or other data cannot go on from it."""

    model: Mapping[str, Any]
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Whole:
    """A checkpoint that has been verified."""

    folder: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps taken."""
        return int(self.meta["step"])


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return root / f"step-{step:08d}"


def listed(root: Path) -> list[Path]:
    """Checkpoint folders, newest first; leftovers under other names are none."""
    found = [path for path in root.glob("step-*") if NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def open_root(root: Path, world: World) -> None:
    """Make the folder of checkpoints, and delete what an interrupted save or clean-up left in it.

    Raises BadInput, on all ranks, where nothing can be written there: better
    now than at the first save.
    """
    problem = world.from_main(_opened(root) if world.main else None)
    if problem:
        raise BadInput(f"{root}: checkpoints cannot be written there ({problem}); name another folder, or checkpoint.enabled false")


def _opened(root: Path) -> str | None:
    probe = root / "step-probe.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        for path in root.glob("step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        return error.strerror
    return None


# --- saving ---------------------------------------------------------------------------------------


def save(
    root: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, meta: Mapping[str, Any], world: World, keep: int
) -> Path:
    """Write the checkpoint after ``step`` steps, all ranks together, and delete all but the newest ``keep``.

    Raises TrainingFailed where it cannot be written; the checkpoints before stay.
    """
    temp = root / f"step-{step:08d}.tmp"
    try:
        _write(temp, _state(model, optimizer), {"step": step, **meta, **_versions(world)}, world)
        if world.main:
            _publish(temp, folder_of(root, step))
            _prune(root, keep)
    except (dcp.CheckpointException, OSError) as error:
        if world.main:
            shutil.rmtree(temp, ignore_errors=True)
        elif isinstance(error, OSError):
            raise  # rank 0, which speaks for all, has not seen this one
        raise TrainingFailed(
            f"{root}: the checkpoint after step {step} could not be written ({_causes(error)}); "
            "once that is put right, the same command goes on from the checkpoint before"
        ) from error
    world.barrier()
    return folder_of(root, step)


def _write(temp: Path, state: dict[str, Any], meta: Mapping[str, Any], world: World) -> None:
    if world.main:
        shutil.rmtree(temp, ignore_errors=True)
        temp.mkdir(parents=True)
    world.barrier()
    dcp.save(state, checkpoint_id=temp)
    if world.main:
        write_json(temp / META, meta)
    entries = world.gathered(_entries(temp, world.rank))
    if world.main:
        write_json(temp / MANIFEST, {name: entry for part in entries for name, entry in part.items()})


def _causes(error: BaseException) -> str:
    """What went wrong on which rank, without torch's tracebacks. (Its exception is a BaseException.)"""
    if isinstance(error, dcp.CheckpointException):
        return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
    return str(error)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=FLAT),
    }


def _versions(world: World) -> dict[str, Any]:
    return {"world_size": world.size, "amlaunch": VERSION, "torch": torch.__version__, "python": platform.python_version()}


def _entries(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """Size and digest of the files that ``rank`` wrote, so that hashing is spread as writing was."""
    mine = [path for path in sorted(folder.iterdir()) if _writer(path.name) == rank]
    return {path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)} for path in mine}


def _writer(name: str) -> int:
    """torch names a rank's files ``__<rank>_<n>.distcp``; the rest is rank 0's."""
    match = re.match(r"__(\d+)_", name)
    return int(match[1]) if match else 0


def _publish(temp: Path, final: Path) -> None:
    """Make ``temp`` the checkpoint ``final``, in one step that a crash cannot halve."""
    fsync_folder(temp)
    if final.exists():  # damaged, or it would have been resumed from
        discard(final)
    os.rename(temp, final)
    fsync_folder(final.parent)
    write_text(final.parent / LATEST, final.name + "\n")


def discard(folder: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that no half of it is ever taken for one."""
    aside = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def _prune(root: Path, keep: int) -> None:
    for folder in [*listed(root)[keep:], *root.glob("step-*.damaged")]:
        discard(folder)


# --- loading --------------------------------------------------------------------------------------


def newest_whole(root: Path, world: World) -> Whole | None:
    """The newest checkpoint whose every byte is as it was written; None where there is none.

    All ranks share the reading and come to the same answer. A newer one that is
    damaged is named, with the file, and set aside: the run will write that step
    again, and only then is it deleted.
    """
    for folder in world.from_main(listed(root) if world.main else None):
        problems = [problem for problem in world.gathered(damage(folder, world.rank, world.size)) if problem]
        if not problems:
            return _whole(folder)
        if world.main:
            _warn(folder, problems[0])
            os.replace(folder, folder.with_name(f"{folder.name}.{time.time_ns()}.damaged"))
        world.barrier()
    return None


def newest_whole_alone(root: Path) -> Whole:
    """As :func:`newest_whole` for a single process that only reads. Raises BadInput where there is none."""
    for folder in listed(root):
        problem = damage(folder)
        if problem is None:
            return _whole(folder)
        _warn(folder, problem)
    raise BadInput(f"{root}: no whole checkpoint there; train first (python -m trainer RECIPE --checkpoints {root})")


def _whole(folder: Path) -> Whole:
    meta = read_json(folder / META)
    if not isinstance(meta, dict):
        raise TrainingFailed(f"{folder / META} went away while it was read")
    return Whole(folder, meta)


def _warn(folder: Path, problem: str) -> None:
    print(f"warning: {folder} is damaged ({problem}); using the one before", flush=True)


def damage(folder: Path, rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with a checkpoint, as far as ``rank`` looks (each at its part of the files); None: nothing."""
    try:
        manifest = read_json(folder / MANIFEST)
    except ValueError as error:
        return f"{MANIFEST} cannot be read: {error}"
    if not isinstance(manifest, dict) or META not in manifest:
        return f"{MANIFEST} is missing"
    for name, entry in list(manifest.items())[rank::ranks]:
        wrong = _file_damage(folder / name, entry)
        if wrong:
            return wrong
    return None


def _file_damage(path: Path, entry: Any) -> str | None:
    if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
        return f"{MANIFEST} says nothing of {path.name}"
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
    if sha256_file(path) != entry["sha256"]:
        return f"{path.name} has other bytes than were written"
    return None


def check_identity(found: Whole, identity: Identity) -> None:
    """Raise BadInput, naming the keys, where a checkpoint is of another model or other data."""
    for what, mine in (("model", identity.model), ("data", identity.data)):
        theirs = found.meta.get(what, {})
        keys = [key for key in dict.fromkeys((*theirs, *mine)) if theirs.get(key) != mine.get(key)]
        if keys:
            shown = "; ".join(f"{key}: {theirs.get(key)!r} there, {mine.get(key)!r} in the recipe" for key in keys)
            raise BadInput(
                f"{found.folder} belongs to another run: its {what} differs ({shown}). "
                "Use another --checkpoints folder, or the recipe that it was made with"
            )


def load(found: Whole, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill model and optimizer, in place, whatever number of ranks wrote the checkpoint.

    The optimizer keeps the settings of its recipe (weight decay, betas): only its state is old.
    """
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    state = _state(model, optimizer)
    try:
        dcp.load(state, checkpoint_id=found.folder)
    except dcp.CheckpointException as error:
        raise TrainingFailed(f"{found.folder} cannot be loaded into this model and optimizer: {_causes(error)}") from error
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=FLAT)
    for group, mine in zip(optimizer.param_groups, settings, strict=True):
        group.update(mine)


def load_weights(found: Whole, model: nn.Module) -> None:
    """Fill the model alone, in a single process without a process group."""
    state = {"model": get_model_state_dict(model)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what is meant
        dcp.load(state, checkpoint_id=found.folder, no_dist=True)
    set_model_state_dict(model, state["model"])
