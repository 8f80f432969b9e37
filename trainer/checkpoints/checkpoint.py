"""Checkpoints that exist whole or not at all: their layout, and how they are found, verified and loaded.

``step-N/`` holds torch.distributed.checkpoint's files, ``meta.json``,
``recipe.yaml``, and ``manifest.json`` with the size and sha256 of each; and
``validation.json``, where the validation came after it. It is
written as ``step-N.tmp/`` (:mod:`amlaunch.trainer.checkpoints.saver`); ``latest`` and ``best`` name
one. Loading checks every byte first: torch itself notices a truncated file, but
loads one with flipped bytes without a word.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import read_json, read_object, sha256_file, write_json
from amlaunch.trainer.parallel.world import World
from amlaunch.trainer.process.errors import TrainingFailed

META = "meta.json"
MANIFEST = "manifest.json"
RECIPE = "recipe.yaml"
VALIDATED = "validation.json"
"""The validation loss of a checkpoint that was validated after it was saved; not in the manifest, which was made before."""
LATEST = "latest"
BEST = "best"
RESTORED = "restored.json"
"""Says that ``checkpoint.restore_from`` was done: what interrupts the run afterwards does not begin there again."""
MODEL = "model"
"""Folder of the weights, where they are safetensors."""
NAME = re.compile(r"step-(\d{8,})")
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
"""Optimizer state under each parameter's own name: independent of groups and of how it was sharded."""
TORCH_SAVE, SAFETENSORS = "torch_save", "safetensors"


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

    @property
    def safetensors(self) -> bool:
        """Whether the weights are safetensors in a folder of their own."""
        return self.meta.get("format", TORCH_SAVE) == SAFETENSORS


def folder_of(root: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def listed(root: Path) -> list[Path]:
    """Checkpoint folders, newest first; leftovers under other names are none."""
    found = [path for path in root.glob("step-*") if NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(found, key=step_of, reverse=True)


def by_validation(root: Path) -> list[Path]:
    """Those of :func:`listed` that were validated when they were saved, or after a stop that came between, the best first."""
    losses = {folder: _val_loss(folder) for folder in listed(root)}
    known = {folder: loss for folder, loss in losses.items() if isinstance(loss, (int, float)) and math.isfinite(loss)}
    return sorted(known, key=lambda folder: known[folder])


def _val_loss(folder: Path) -> Any:
    loss = read_object(folder / META).get("val_loss")
    return read_object(folder / VALIDATED).get("val_loss") if loss is None else loss


def discard(folder: Path) -> None:
    """Delete a checkpoint; it loses its name first, so that no half of it is ever taken for one."""
    aside = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def causes(error: BaseException) -> str:
    """What went wrong on which rank, without torch's tracebacks. (Its exception is a BaseException.)"""
    if isinstance(error, dcp.CheckpointException):
        return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
    return f"{type(error).__name__}: {error}" if not isinstance(error, OSError) else str(error)


Optimizers = Sequence[torch.optim.Optimizer]


def state_of(model: nn.Module, optimizers: Optimizers) -> dict[str, Any]:
    """All that a checkpoint holds of the training itself; the rest is a function of step and seed."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizers, options=FLAT),
    }


# --- finding --------------------------------------------------------------------------------------


def start_point(root: Path, wish: str, identity: Identity, world: World) -> Whole | None:
    """The checkpoint that ``checkpoint.restore_from`` means, verified; None: begin at the beginning.

    ``auto``: the newest, if there is one. ``latest``: the newest. ``best``: that
    of the lowest validation loss. Else a path: of a checkpoint, or of a folder
    of them. The last two hold once: the run's newer checkpoints are set aside,
    and after an interruption it goes on from what it saved itself. Raises
    BadInput, on all ranks, where there is no such checkpoint, or it is of
    another model or other data.
    """
    if wish in ("auto", "latest"):
        newest = newest_whole(listed(root), world)
        return newest if newest is None and wish == "auto" else checked(_needed(newest, root, wish), identity)
    key = wish if wish == "best" else str(Path(wish).expanduser().resolve())
    if world.broadcast(read_object(root / RESTORED).get("restore_from") == key if world.is_main else None):
        own = newest_whole(listed(root), world)
        if own is not None:
            return checked(own, identity)
    candidates = by_validation(root) if key == "best" else _named(Path(key))
    found = checked(_needed(newest_whole(candidates, world, set_aside=key == "best"), root, wish), identity)
    if world.is_main:
        _go_back(root, found, key)
    world.barrier()
    return found


def _needed(found: Whole | None, root: Path, wish: str) -> Whole:
    if found is not None:
        return found
    if wish not in ("latest", "best"):
        raise BadInput(
            f"checkpoint.restore_from {wish}: no whole checkpoint there (seen from {Path.cwd()}); write auto, latest, best, or a checkpoint's folder"
        )
    why = "was validated when it was saved" if wish == "best" else "is whole"
    there = ", ".join(path.name for path in listed(root)) or "none"
    raise BadInput(
        f"checkpoint.restore_from {wish}: no checkpoint in {root} {why} (there are: {there}); auto begins anew where there is none"
    )


def _named(path: Path) -> list[Path]:
    """A checkpoint's own folder, or all in a folder of them."""
    return [path] if (path / MANIFEST).exists() else listed(path)


def _go_back(root: Path, found: Whole, key: str) -> None:
    """Set aside the run's checkpoints that belong to another course of events; the next save deletes them."""
    for folder in listed(root):
        if step_of(folder) > found.step or (found.folder.parent != root and folder != found.folder):
            os.replace(folder, folder.with_name(f"{folder.name}.{time.time_ns()}.replaced"))
    write_json(root / RESTORED, {"restore_from": key, "step": found.step})


def newest_whole(folders: Sequence[Path], world: World, *, set_aside: bool = True) -> Whole | None:
    """The first of ``folders`` whose every byte is as it was written; None where there is none.

    All ranks share the reading and come to the same answer. One that is damaged
    is named, with the file, and set aside: the run will write that step again,
    and only then is it deleted.
    """
    for folder in world.broadcast(list(folders) if world.is_main else None):
        problems = [problem for problem in world.all_gather(damage(folder, world.rank, world.size)) if problem]
        if not problems:
            return _whole(folder)
        if world.is_main:
            _warn(folder, problems[0])
            if set_aside:
                os.replace(folder, folder.with_name(f"{folder.name}.{time.time_ns()}.damaged"))
        world.barrier()
    return None


def alone(root: Path, *, step: int | None = None, best: bool = False) -> Whole:
    """A whole checkpoint for a single process that only reads: the newest, the best, or that of ``step``.

    The newest falls back to the one before, with a warning; what was asked for
    by name does not. Raises BadInput where there is none.
    """
    folders = by_validation(root) if best else listed(root)
    if step is not None:
        folders = [folder for folder in folders if step_of(folder) == step]
    for folder in folders:
        problem = damage(folder)
        if problem is None:
            return _whole(folder)
        if step is not None:
            raise BadInput(f"{folder} is damaged ({problem})")
        _warn(folder, problem)
    there = ", ".join(str(step_of(folder)) for folder in listed(root)) or "none"
    if step is not None:
        raise BadInput(f"{root}: no checkpoint after step {step}; there are those after {there}")
    if best:
        raise BadInput(
            f"{root}: no checkpoint was validated when it was saved (val_every_steps, ckpt_every_steps); there are those after {there}"
        )
    raise BadInput(
        f"{root}: no whole checkpoint there; train first (python -m amlaunch.trainer RECIPE --checkpoints {root})"
    )


def _whole(folder: Path) -> Whole:
    meta = read_json(folder / META)
    if not isinstance(meta, dict):
        raise TrainingFailed(f"{folder / META} went away while it was read")
    return Whole(folder, meta)


def _warn(folder: Path, problem: str) -> None:
    print(f"warning: {folder} is damaged ({problem}); using the one before", flush=True)


# --- verifying and loading ---------------------------------------------------------------------------


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


def checked(found: Whole, identity: Identity) -> Whole:
    """``found``; BadInput, naming the keys, where it is of another model or other data."""
    for what, mine in (("model", identity.model), ("data", identity.data)):
        theirs = found.meta.get(what, {})
        keys = [key for key in dict.fromkeys((*theirs, *mine)) if theirs.get(key) != mine.get(key)]
        if keys:
            shown = "; ".join(f"{key}: {theirs.get(key)!r} there, {mine.get(key)!r} in the recipe" for key in keys)
            raise BadInput(
                f"{found.folder} belongs to another run: its {what} differs ({shown}). "
                "Use another --checkpoints folder, or the recipe that it was made with"
            )
    return found


def load(found: Whole, model: nn.Module, optimizers: Optimizers) -> None:
    """Fill model and optimizers, in place, whatever number of ranks wrote the checkpoint.

    Optimizers keep the settings of their recipe (weight decay, betas): only their state is old.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    state = state_of(model, optimizers)
    try:
        read(found, state)
    except (dcp.CheckpointException, KeyError, RuntimeError) as error:
        raise TrainingFailed(
            f"{found.folder} cannot be loaded into this model and optimizer: {causes(error)}"
        ) from error
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizers, state["optimizer"], options=FLAT)
    for group, mine in zip(
        (group for optimizer in optimizers for group in optimizer.param_groups), settings, strict=True
    ):
        group.update(mine)


def load_weights(found: Whole, model: nn.Module) -> None:
    """Fill the model alone, in a single process without a process group."""
    state = {"model": get_model_state_dict(model)}
    read(found, state, alone=True)
    set_model_state_dict(model, state["model"])


def full_weights(found: Whole) -> dict[str, torch.Tensor]:
    """All weights of a checkpoint by name, on the CPU, read by this process alone."""
    prefix = "" if found.safetensors else "model."
    entries = _reader(found, "model").read_metadata().state_dict_metadata
    sizes = {key.removeprefix(prefix): entry for key, entry in entries.items() if key.startswith(prefix)}
    weights = {
        name: torch.empty(e.size, dtype=e.properties.dtype)
        for name, e in sizes.items()
        if isinstance(e, TensorStorageMetadata)
    }
    read(found, {"model": weights}, alone=True)
    return weights


def read(found: Whole, state: dict[str, Any], *, alone: bool = False) -> None:
    """Read ``state``'s parts (``model``, ``optimizer``) into its tensors; ``alone``: no other rank takes part."""
    parts = (
        [{"model": state["model"]}, {k: v for k, v in state.items() if k != "model"}] if found.safetensors else [state]
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what is meant
        for part in parts:
            if part:
                bare = found.safetensors and "model" in part  # safetensors hold the weights under their own names
                dcp.load(
                    part["model"] if bare else part, storage_reader=_reader(found, next(iter(part))), no_dist=alone
                )


def _reader(found: Whole, part: str) -> dcp.FileSystemReader:
    if found.safetensors and part == "model":
        return dcp.HuggingFaceStorageReader(str(found.folder / MODEL))
    return dcp.FileSystemReader(found.folder)
