"""``amlaunch clean``: what can go, and how large it is; with ``--yes`` it goes."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from amlaunch.launcher.commands._shared import add_json, add_runs
from amlaunch.launcher.commands.cancel import own_states, refuse_unknown
from amlaunch.launcher.display import wording
from amlaunch.launcher.runs.element_state import is_driven, read_run
from amlaunch.launcher.runs.find import find_run, list_runs, read_plan, roots
from amlaunch.launcher.runs.submissions import read_submissions
from amlaunch.launcher.slurm.queue import Queue
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.files import is_locked
from amlaunch.recipes.run_layout import RunDir

LEFTOVER_SECONDS = 24 * 3600
"""A temporary file that is younger may still be written."""


@dataclass(frozen=True)
class Removal:
    """One thing that can go."""

    path: Path
    size: int
    why: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch clean``."""
    parser.add_argument(
        "run", nargs="*", help="runs to delete (default: shards that no run uses and leftover temporary files)"
    )
    parser.add_argument(
        "--checkpoints", action="store_true", help="of the runs, delete only all but the newest checkpoint"
    )
    parser.add_argument("--yes", action="store_true", help="delete it")
    add_runs(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print what would go; remove it only with ``--yes``."""
    places = roots(options.runs)
    found = (
        [one for name in options.run for one in _of_run(find_run(places, name), options)]
        if options.run
        else list(_leftovers(places))
    )
    for one in found:
        if options.yes:
            _remove(one.path)
        if not options.json:
            print(
                f"{'removed' if options.yes else 'would remove'}  {wording.count(one.size):>8}B  {one.path}  ({one.why})",
                flush=True,
            )
    if options.json:
        rows = [
            {"path": str(one.path), "bytes": one.size, "why": one.why, "removed": bool(options.yes)} for one in found
        ]
        print(wording.to_json(rows))
    elif not found:
        print("nothing to clean")
    elif not options.yes:
        print(f"\n{wording.count(sum(one.size for one in found))}B in all; the same command with --yes removes it")
    return OK


def _of_run(run_dir: RunDir, options: argparse.Namespace) -> Iterable[Removal]:
    """A run as a whole, or with ``--checkpoints`` what its training no longer needs. Raises BadInput where it still runs."""
    plan = read_plan(run_dir)
    states = own_states(run_dir, plan, read_run(run_dir, plan, Queue(max_age=0)))
    if is_driven(run_dir, states):
        raise BadInput(f"{plan.run_id} runs or waits; {wording.program()} cancel {wording.name_of(run_dir)} first")
    refuse_unknown(
        states,
        "clean",
        f"nothing was removed; when Slurm answers, {wording.program()} cancel {wording.name_of(run_dir)} first",
    )
    if not options.checkpoints:
        yield Removal(run_dir.root, size_of(run_dir.root), "the run; shards that others may read stay")
        for folder in _checkpoints_elsewhere(run_dir, plan):
            yield Removal(folder, size_of(folder), "its checkpoints")
        return
    for folder in [run_dir.root / "checkpoints", *_checkpoints_elsewhere(run_dir, plan)]:
        for element in sorted(folder.iterdir()) if folder.is_dir() else []:
            steps = sorted(
                element.glob("step-*"), key=lambda path: int(path.name[5:]) if path.name[5:].isdigit() else -1
            )
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
    """What no run reads: shards without a run, checks of the doctor, and what killed processes left half made."""
    queue = Queue(max_age=0)
    places = list({root.resolve(): root for root in places}.values())
    used = {folder.resolve() for run_dir in _all_runs(places) for folder in (run_dir.data, run_dir.shared)}
    for folder in dict.fromkeys(root.resolve().parent / "data" for root in places if root.is_dir()):
        for data in sorted(folder.iterdir()) if folder.is_dir() else []:
            if data.resolve() not in used and (data / "stages").is_dir() and _is_ours(data) and not in_use(data, queue):
                yield Removal(data, size_of(data), "shards that no run reads")
    for root in places:
        checks = root / "doctor"
        for check in sorted(checks.iterdir()) if checks.is_dir() else []:
            if check.is_dir() and _is_old(check) and not in_use(check, queue):
                yield Removal(check, size_of(check), "a check of amlaunch doctor, over a day old")
        for run_dir in list_runs(root):
            yield from _half_made(run_dir.root)


def _all_runs(places: list[Path]) -> list[RunDir]:
    """The runs of every root that may share a folder of shards with ``places``: those known by name, and those beside them."""
    beside = [
        folder
        for parent in {root.resolve().parent for root in places}
        if parent.is_dir()
        for folder in parent.iterdir()
        if folder.is_dir()
    ]
    return list_runs(*dict.fromkeys(root.resolve() for root in [*places, *roots(), *beside]))


def _is_ours(folder: Path) -> bool:
    """Whether this user made a folder: the runs of others may be closed to us, and with them what they read."""
    return folder.stat().st_uid == os.getuid()


def in_use(folder: Path, queue: Queue) -> bool:
    """Whether something is being made in a folder, by a process or a job of whatever run; also where nobody can say."""
    if any(is_locked(lock) for lock in [folder / "submit.lock", folder / "lock", *folder.glob("stages/*/*/lock")]):
        return True
    submissions = read_submissions(folder / "jobs")
    if not submissions:
        return False
    if queue.jobs is None or not all(_is_ours(one.folder) for one in submissions):  # Slurm shows everybody his own
        return True
    active = [info for info in queue.jobs.values() if info.active]
    known = {info.comment for info in active} | {info.id.split("_")[0] for info in active}
    return any(one.token in known or one.job in known for one in submissions)


def _half_made(root: Path) -> Iterable[Removal]:
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder) / name
            half = name.endswith(".tmp") or (name.startswith(".code.") and Path(folder) == root)
            if half and not path.is_symlink() and _is_old(path):
                yield Removal(path, size_of(path), "half made, over a day old")
        folders[:] = [name for name in folders if not name.endswith(".tmp")]


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > LEFTOVER_SECONDS
    except OSError:  # a heartbeat that was being written, and is in its place now
        return False


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
