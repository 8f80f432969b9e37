"""Folders of checkpoints: their files, their order, which of them are kept, and what is damaged.

The trainer writes them, and ``amlaunch clean`` removes what training does not need; only the trainer can load torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amlaunch.recipes.files import read_json, read_object, sha256_file
from amlaunch.recipes.format.schema import Checkpoint

META = "meta.json"
MANIFEST = "manifest.json"
VALIDATION = "validation.json"
"""Validation loss of a step that was validated after it was saved; not listed in the older manifest."""
LATEST = "latest"
BEST = "best"
FOLDER_NAME = re.compile(r"step-(\d{8,})")


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint folder."""
    return int(folder.name.removeprefix("step-"))


def list_checkpoints(root: Path) -> list[Path]:
    """List the checkpoint folders, newest first, without temporary and set-aside folders."""
    folders = [path for path in root.glob("step-*") if FOLDER_NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted(folders, key=step_of, reverse=True)


def list_by_validation_loss(root: Path) -> list[Path]:
    """List the validated checkpoints, lowest validation loss first.

    The validation may have run before the save, or after a stop and restart.
    """
    losses = {}
    for folder in list_checkpoints(root):
        loss = _validation_loss(folder)
        if isinstance(loss, (int, float)) and math.isfinite(loss):
            losses[folder] = loss
    return sorted(losses, key=lambda folder: losses[folder])


def _validation_loss(folder: Path) -> Any:
    loss = read_object(folder / META).get("val_loss")
    return read_object(folder / VALIDATION).get("val_loss") if loss is None else loss


def expired_checkpoints(root: Path, section: Checkpoint) -> list[Path]:
    """List the folders to delete: set-aside ones, and checkpoints that no retention rule of the recipe keeps."""
    folders = list_checkpoints(root)
    kept = set(folders[: section.max_recent_checkpoints])
    if section.keep_best:
        kept.update(list_by_validation_loss(root)[:1])
    if section.keep_every_steps:
        kept.update(folder for folder in folders if step_of(folder) % section.keep_every_steps == 0)
    set_aside = [*root.glob("step-*.damaged"), *root.glob("step-*.replaced")]
    return [folder for folder in (*folders, *set_aside) if folder not in kept]


@dataclass(frozen=True)
class Damage:
    """Damage of one file of a checkpoint."""

    problem: str
    is_unreadable: bool = False
    """True if the file system refused to read the file (EIO, ESTALE), which may pass."""

    def __str__(self) -> str:
        return self.problem


def find_damage(folder: Path, rank: int = 0, ranks: int = 1) -> Damage | None:
    """Return the first damage that ``rank`` finds in its share of a checkpoint's files; None if intact.

    Raises no OSError: an error on one rank would leave the others waiting.
    """
    name = MANIFEST
    try:
        manifest = read_json(folder / MANIFEST)
        if not isinstance(manifest, dict) or META not in manifest:
            return Damage(f"{MANIFEST} is missing")
        for name, entry in list(manifest.items())[rank::ranks]:
            problem = _find_file_damage(folder / name, entry)
            if problem:
                return Damage(problem)
    except ValueError as error:
        return Damage(f"{MANIFEST} cannot be read: {error}")
    except OSError as error:
        return Damage(f"{name} cannot be read: {error.strerror}", is_unreadable=True)
    return None


def _find_file_damage(path: Path, entry: Any) -> str | None:
    if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
        return f"{MANIFEST} has no valid entry for {path.name}"
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.name}: expected {entry['bytes']} bytes, got {path.stat().st_size}"
    if sha256_file(path) != entry["sha256"]:
        return f"{path.name}: checksum mismatch"
    return None
