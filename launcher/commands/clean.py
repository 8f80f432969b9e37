"""``amlaunch clean``: what can go, and how large it is; with ``--yes`` it goes."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launcher import describe
from launcher.plan import Plan
from launcher.queue import Queue
from launcher.state import is_driven, read_run
from launcher.store import find_run, list_runs, read_plan, roots
from recipes.errors import OK, BadInput
from recipes.rundir import RunDir

LEFTOVER_SECONDS = 24 * 3600
"""A temporary file that is younger may still be written."""


@dataclass(frozen=True)
class Removal:
    """One thing that can go."""

    path: Path
    size: int
    why: str


def run(options: argparse.Namespace) -> int:
    """Print what would go; remove it only with ``--yes``."""
    places = roots(options.runs)
    found = [one for name in options.run for one in _of_run(find_run(places, name), options)] if options.run else list(_leftovers(places))
    if options.json:
        rows = [{"path": str(one.path), "bytes": one.size, "why": one.why, "removed": bool(options.yes)} for one in found]
        print(describe.to_json(rows))
    else:
        _show(found, options)
    if options.yes:
        for one in found:
            _remove(one.path)
    return OK


def _show(found: list[Removal], options: argparse.Namespace) -> None:
    for one in found:
        print(f"{'removed' if options.yes else 'would remove'}  {describe.count(one.size):>8}B  {one.path}  ({one.why})")
    total = describe.count(sum(one.size for one in found))
    if not found:
        print("nothing to clean")
    elif not options.yes:
        print(f"\n{total}B in all; the same command with --yes removes it")


def _of_run(run_dir: RunDir, options: argparse.Namespace) -> Iterable[Removal]:
    """A run as a whole, or with ``--checkpoints`` what its training no longer needs. Raises BadInput where it still runs."""
    plan = read_plan(run_dir)
    if is_driven(run_dir, read_run(run_dir, plan, Queue(max_age=0))):
        raise BadInput(f"{plan.run_id} runs or waits; {describe.program()} cancel {describe.name_of(run_dir)} first")
    if not options.checkpoints:
        yield Removal(run_dir.root, size_of(run_dir.root), "the run; shards that others may read stay")
        for folder in _checkpoints_elsewhere(run_dir, plan):
            yield Removal(folder, size_of(folder), "its checkpoints")
        return
    for folder in [run_dir.root / "checkpoints", *_checkpoints_elsewhere(run_dir, plan)]:
        for element in sorted(folder.iterdir()) if folder.is_dir() else []:
            steps = sorted(element.glob("step-*"), key=lambda path: int(path.name[5:]) if path.name[5:].isdigit() else -1)
            for step in steps[:-1]:
                yield Removal(step, size_of(step), "not the newest checkpoint")


def _checkpoints_elsewhere(run_dir: RunDir, plan: Plan) -> list[Path]:
    """Where ``checkpoint.checkpoint_dir`` put them, as the train elements' own arguments say."""
    folders = []
    for stage in plan.stages:
        for element in stage.elements if stage.name == "train" else []:
            words = element.arguments
            place = Path(words[words.index("--checkpoints") + 1]) if "--checkpoints" in words else run_dir.root
            if not place.is_relative_to(run_dir.root) and place.parent.is_dir() and place.parent not in folders:
                folders.append(place.parent)
    return folders


def _leftovers(places: list[Path]) -> Iterable[Removal]:
    """What no run reads: shards without a run, and what killed processes left half made."""
    for root in places:
        runs = list_runs(root)
        used = {run_dir.data.resolve() for run_dir in runs} | {run_dir.shared.resolve() for run_dir in runs}
        folder = root.resolve().parent / "data"
        for data in sorted(folder.iterdir()) if runs and folder.is_dir() else []:
            if data.is_dir() and data.resolve() not in used and (data / "stages").is_dir():
                yield Removal(data, size_of(data), "shards that no run reads")
        for run_dir in runs:
            yield from _half_made(run_dir.root)


def _half_made(root: Path) -> Iterable[Removal]:
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder) / name
            half = name.endswith(".tmp") or (name.startswith(".code.") and Path(folder) == root)
            if half and not path.is_symlink() and time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                yield Removal(path, size_of(path), "half made, over a day old")
        folders[:] = [name for name in folders if not name.endswith(".tmp")]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links are not followed."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size
    return sum(entry.lstat().st_size for entry in path.rglob("*") if not entry.is_dir() or entry.is_symlink())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
