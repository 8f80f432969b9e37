"""Layout of checkpoints on disk, and how they are selected, verified and loaded.

``step-N/`` holds the files of torch.distributed.checkpoint, ``meta.json``,
``recipe.json``, ``manifest.json`` with the size and SHA-256 of each of these,
and ``validation.json`` if the step was validated only after it was saved. The
folder is written as ``step-N.tmp/`` (:mod:`amlaunch.trainer.checkpoints.saver`)
and then renamed, so it is either complete or absent. ``latest`` and ``best``
each name one. Loading first verifies every byte: torch notices a truncated
file, but silently loads one with flipped bits.
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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

from amlaunch.recipes.checkpoint_folders import (
    MANIFEST,
    META,
    Damage,
    find_damage,
    list_by_validation_loss,
    list_checkpoints,
    step_of,
)
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import read_json, read_object, write_json
from amlaunch.recipes.version import torch_release
from amlaunch.trainer.parallel.world import World
from amlaunch.trainer.process.errors import TrainingFailed

RECIPE = "recipe.json"
RESTORED = "restored.json"
"""Records that ``checkpoint.restore_from`` was applied, so that a restarted run does not go back to it again."""
MODEL = "model"
"""Folder of the weights in safetensors format."""
FLAT_OPTIMIZER_STATE = StateDictOptions(flatten_optimizer_state_dict=True)
"""Store optimizer state under parameter names, independent of parameter groups and sharding."""
TORCH_SAVE, SAFETENSORS = "torch_save", "safetensors"


@dataclass(frozen=True)
class Identity:
    """Model and data that a checkpoint belongs to; a run with other ones cannot resume from it."""

    model: Mapping[str, Any]
    data: Mapping[str, Any]


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint folder and its metadata."""

    folder: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return int(self.meta["step"])

    @property
    def has_safetensors(self) -> bool:
        """True if the weights are safetensors files in their own folder."""
        return self.meta.get("format", TORCH_SAVE) == SAFETENSORS


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return the folder of the checkpoint of ``step``."""
    return root / f"step-{step:08d}"


def delete_checkpoint(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a partly deleted one is never mistaken for a checkpoint."""
    renamed = folder.with_name(f"{folder.name}.old.tmp")
    shutil.rmtree(renamed, ignore_errors=True)
    os.rename(folder, renamed)
    shutil.rmtree(renamed, ignore_errors=True)


def describe_error(error: BaseException) -> str:
    """Describe an error, with its rank for torch's CheckpointException (a BaseException), without tracebacks."""
    if isinstance(error, dcp.CheckpointException):
        return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def may_pass(error: BaseException) -> bool:
    """Return True if the same save can succeed later: errors of disks, memory and other ranks.

    Torch's C++ raises RuntimeError for all of these, and safetensors its own error for a full disk. Every other type
    says that code and data do not fit together, and comes back at the next save.
    """
    if isinstance(error, dcp.CheckpointException):
        return all(may_pass(cause) for cause, _ in error.failures.values())
    if isinstance(error, TrainingFailed) and error.__cause__ is not None:
        return may_pass(error.__cause__)
    if isinstance(error, NotImplementedError):
        return False
    # not imported here, because only some formats need safetensors
    is_of_safetensors = type(error).__name__ == "SafetensorError"
    return isinstance(error, (OSError, MemoryError, RuntimeError)) or is_of_safetensors


def training_state_dict(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Return the state dict that a checkpoint stores; all other state is a function of step and seed."""
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizers, options=FLAT_OPTIMIZER_STATE),
    }


# --- selecting ------------------------------------------------------------------------------------


def find_start(root: Path, restore_from: str, identity: Identity, world: World) -> StoredCheckpoint | None:
    """Return the verified checkpoint that ``checkpoint.restore_from`` selects; None to start from scratch.

    ``auto``: the newest one, if any. ``latest``: the newest one. ``best``: the
    one with the lowest validation loss. Otherwise the path of a checkpoint or of
    a folder of checkpoints. ``best`` and paths apply once: the run's newer
    checkpoints are set aside, and after an interruption the run resumes from its
    own newest checkpoint. Raises BadInput on all ranks if there is no such
    checkpoint, or if it belongs to another model or other data.
    """
    if restore_from in ("auto", "latest"):
        newest = newest_intact(list_checkpoints(root), world)
        if newest is None and restore_from == "auto":
            return None
        return check_identity(_require(newest, root, restore_from), identity)

    key = restore_from if restore_from == "best" else str(Path(restore_from).expanduser().resolve())
    if world.broadcast(read_object(root / RESTORED).get("restore_from") == key if world.is_main else None):
        own_newest = newest_intact(list_checkpoints(root), world)
        if own_newest is not None:
            return check_identity(own_newest, identity)

    candidates = list_by_validation_loss(root) if key == "best" else _checkpoints_at(Path(key))
    intact = newest_intact(candidates, world, set_aside=key == "best")
    start = check_identity(_require(intact, root, restore_from), identity)
    if world.is_main:
        _rewind(root, start, key)
    world.barrier()
    return start


def _require(checkpoint: StoredCheckpoint | None, root: Path, restore_from: str) -> StoredCheckpoint:
    if checkpoint is not None:
        return checkpoint
    if restore_from not in ("latest", "best"):
        raise BadInput(
            f"checkpoint.restore_from: no intact checkpoint at {restore_from} (working directory: {Path.cwd()}). "
            "Set it to auto, latest, best, or the path of a checkpoint"
        )
    kind = "validated" if restore_from == "best" else "intact"
    names = ", ".join(path.name for path in list_checkpoints(root)) or "none"
    raise BadInput(
        f"checkpoint.restore_from: {restore_from}, but {root} has no {kind} checkpoint (available: {names}). "
        "Set it to auto to start from scratch if there is none"
    )


def _checkpoints_at(path: Path) -> list[Path]:
    """Return ``path`` if it is a checkpoint, or else all checkpoints in it."""
    return [path] if (path / MANIFEST).exists() else list_checkpoints(path)


def _rewind(root: Path, start: StoredCheckpoint, key: str) -> None:
    """Set aside the run's checkpoints that do not precede ``start``; the next save deletes them."""
    is_own = start.folder.parent == root
    for folder in list_checkpoints(root):
        is_newer = step_of(folder) > start.step
        if is_newer or (not is_own and folder != start.folder):
            os.replace(folder, folder.with_name(f"{folder.name}.{time.time_ns()}.replaced"))
    write_json(root / RESTORED, {"restore_from": key, "step": start.step})


def newest_intact(folders: Sequence[Path], world: World, *, set_aside: bool = True) -> StoredCheckpoint | None:
    """Return the first of ``folders`` whose every byte is verified; None if there is none.

    All ranks share the reading and agree on the result. A damaged checkpoint is reported with the file concerned, and
    set aside. The run will write that step again, and only then is the damaged one deleted. Raises TrainingFailed on
    all ranks if none is intact and some cannot be read: another node may be able to.
    """
    damaged: dict[Path, Damage] = {}
    intact = None
    for folder in world.broadcast(list(folders) if world.is_main else None):
        damages = [damage for damage in world.all_gather(find_damage(folder, world.rank, world.size)) if damage]
        if not damages:
            intact = folder
            break
        damaged[folder] = next((damage for damage in damages if damage.is_unreadable), damages[0])
        if world.is_main:
            _warn_damaged(folder, damaged[folder])
    unreadable = next((folder for folder, damage in damaged.items() if damage.is_unreadable), None)
    if intact is None and unreadable is not None:
        raise TrainingFailed(f"{unreadable}: {damaged[unreadable]}. Starting from scratch would lose its work")
    if world.is_main and set_aside:
        for folder in damaged:
            _set_damaged_aside(folder)
    world.barrier()
    return _read_meta(intact) if intact is not None else None


def select_checkpoint(root: Path, *, step: int | None = None, best: bool = False) -> StoredCheckpoint:
    """Return an intact checkpoint for a single process that only reads: the newest, the best, or that of ``step``.

    If the newest or best is damaged, the next candidate is used, with a warning.
    Raises BadInput if there is none, or if the one of ``step`` is damaged.
    """
    folders = list_by_validation_loss(root) if best else list_checkpoints(root)
    if step is not None:
        folders = [folder for folder in folders if step_of(folder) == step]
    for folder in folders:
        damage = find_damage(folder)
        if damage is None:
            return _read_meta(folder)
        if step is not None:
            raise BadInput(f"{folder} is damaged ({damage}). Choose another --step")
        _warn_damaged(folder, damage)

    available = ", ".join(str(step_of(folder)) for folder in list_checkpoints(root)) or "none"
    if step is not None:
        raise BadInput(f"{root}: no checkpoint of step {step}. Available steps: {available}")
    if best:
        raise BadInput(
            f"{root}: no intact checkpoint has a validation loss (step_scheduler.val_every_steps, ckpt_every_steps). "
            f"Choose a --step. Available steps: {available}"
        )
    raise BadInput(f"{root}: no intact checkpoint. Train first: python -m amlaunch.trainer RECIPE --checkpoints {root}")


def _read_meta(folder: Path) -> StoredCheckpoint:
    meta = read_json(folder / META)
    if not isinstance(meta, dict):
        raise TrainingFailed(f"{folder / META} disappeared while it was being read")
    return StoredCheckpoint(folder, meta)


def _set_damaged_aside(folder: Path) -> None:
    try:
        os.replace(folder, folder.with_name(f"{folder.name}.{time.time_ns()}.damaged"))
    except OSError as error:
        # The other ranks wait for rank 0, and the folder is read again only at the next start.
        print(f"warning: {folder} cannot be set aside ({error.strerror})", flush=True)


def _warn_damaged(folder: Path, damage: Damage) -> None:
    print(f"warning: {folder} is damaged ({damage}); trying the next older checkpoint", flush=True)


# --- verifying ------------------------------------------------------------------------------------


def check_identity(checkpoint: StoredCheckpoint, identity: Identity) -> StoredCheckpoint:
    """Return ``checkpoint``. Raises BadInput with the differing keys if it belongs to another model or other data."""
    for section, expected in (("model", identity.model), ("data", identity.data)):
        stored = checkpoint.meta.get(section, {})
        keys = [key for key in dict.fromkeys((*stored, *expected)) if stored.get(key) != expected.get(key)]
        if keys:
            differences = "; ".join(
                f"{key}: {stored.get(key)!r} in the checkpoint, {expected.get(key)!r} in the recipe" for key in keys
            )
            raise BadInput(
                f"{checkpoint.folder} belongs to another run: its {section} differs ({differences}). "
                "Use another --checkpoints folder, or the recipe that wrote this checkpoint"
            )
    return checkpoint


# --- loading --------------------------------------------------------------------------------------


def load(checkpoint: StoredCheckpoint, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Load model and optimizers in place, whatever number of ranks wrote the checkpoint.

    Only optimizer state is restored; settings such as weight decay and betas stay those of the recipe.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    state = training_state_dict(model, optimizers)
    with _explained_errors(checkpoint):
        read_into(checkpoint, state)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizers, state["optimizer"], options=FLAT_OPTIMIZER_STATE)

    # loading may replace the group dicts, so they are collected again
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group, group_settings in zip(groups, settings, strict=True):
        group.update(group_settings)


@contextmanager
def _explained_errors(checkpoint: StoredCheckpoint) -> Iterator[None]:
    """Turn torch's errors into TrainingFailed, with a hint if a newer torch wrote the checkpoint."""
    try:
        yield
    except (dcp.CheckpointException, KeyError, RuntimeError, ValueError) as error:
        hint = _version_hint(str(checkpoint.meta.get("torch", "")))
        raise TrainingFailed(
            f"{checkpoint.folder} cannot be loaded into this model and optimizer: {describe_error(error)}{hint}"
        ) from error


def _version_hint(written_with: str) -> str:
    """Return a hint if a newer torch wrote a checkpoint: torch reads the files of older releases only."""
    written, own = torch_release(written_with), torch_release(torch.__version__)
    if written is None or own is None or written <= own:
        return ""
    return f". It was written with torch {written_with}, and this is torch {torch.__version__}; use the newer one"


def load_weights(checkpoint: StoredCheckpoint, model: nn.Module) -> None:
    """Load only the model, in a single process without a process group."""
    state = {"model": get_model_state_dict(model)}
    with _explained_errors(checkpoint):
        read_into(checkpoint, state, single_process=True)
    set_model_state_dict(model, state["model"])


def read_full_weights(checkpoint: StoredCheckpoint) -> dict[str, torch.Tensor]:
    """Read all unsharded weights by name onto the CPU, in this process alone."""
    prefix = "" if checkpoint.has_safetensors else "model."
    with _explained_errors(checkpoint):
        entries = _reader(checkpoint, "model").read_metadata().state_dict_metadata
        weights = {
            key.removeprefix(prefix): torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in entries.items()
            if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
        }
        read_into(checkpoint, {"model": weights}, single_process=True)
    return weights


def read_into(checkpoint: StoredCheckpoint, state: dict[str, Any], *, single_process: bool = False) -> None:
    """Read the entries of ``state`` (``model``, ``optimizer``) into its tensors.

    ``single_process``: no other rank takes part.
    """
    sections = [state]
    if checkpoint.has_safetensors:
        sections = [{"model": state["model"]}, {key: value for key, value in state.items() if key != "model"}]
    with warnings.catch_warnings():
        # torch warns about ``no_dist``, which is intended here
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        for section in filter(None, sections):
            # safetensors store the weights under their own names, without the prefix "model."
            is_bare = checkpoint.has_safetensors and "model" in section
            dcp.load(
                section["model"] if is_bare else section,
                storage_reader=_reader(checkpoint, next(iter(section))),
                no_dist=single_process,
            )


def _reader(checkpoint: StoredCheckpoint, section: str) -> dcp.FileSystemReader:
    if checkpoint.has_safetensors and section == "model":
        return dcp.HuggingFaceStorageReader(str(checkpoint.folder / MODEL))
    return dcp.FileSystemReader(checkpoint.folder)
