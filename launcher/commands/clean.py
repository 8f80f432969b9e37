"""``amlaunch clean``: list what can be deleted and its size; with ``--yes`` delete it."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

from amlaunch.launcher.commands._shared import add_json_option, add_runs_option, own_states, raise_if_unknown
from amlaunch.launcher.display import wording
from amlaunch.launcher.runs.element_state import is_driven, read_run
from amlaunch.launcher.runs.find import find_run, list_runs, read_plan, roots
from amlaunch.launcher.runs.submissions import read_submissions
from amlaunch.launcher.slurm.queue import Queue
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.checkpoint_folders import expired_checkpoints, find_damage, list_checkpoints
from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.files import is_locked, read_object
from amlaunch.recipes.format.schema import Checkpoint
from amlaunch.recipes.run_layout import READERS, RunDir

MIN_LEFTOVER_SECONDS = 24 * 3600
"""Age of a leftover; a younger temporary file may still be written to."""


@dataclass(frozen=True)
class Removal:
    """A file or folder that can be deleted."""

    path: Path
    size: int
    why: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch clean``."""
    parser.add_argument(
        "run", nargs="*", help="runs to delete (default: shards that no run uses, and leftover temporary files)"
    )
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        help="delete only older checkpoints of RUN; the newest intact one and those that its recipe keeps stay",
    )
    parser.add_argument("--yes", action="store_true", help="delete what is listed")
    add_runs_option(parser)
    add_json_option(parser)


def run(options: argparse.Namespace) -> int:
    """List what can be deleted; delete it only with ``--yes``."""
    if options.checkpoints and not options.run:
        raise BadInput("--checkpoints needs a run; write amlaunch clean RUN --checkpoints")
    folders = roots(options.runs)
    removals: list[Removal] = []
    for name in options.run:
        removals += _removals_of_run(find_run(folders, name, only=True), checkpoints_only=options.checkpoints)
    if not options.run:
        removals += _leftovers(folders)

    holders = _holders([removal.path for removal in removals])
    for path, holder in holders.items():
        if options.run:
            raise BadInput(f"{path} is in use by {holder}; nothing was removed. Stop that process first")
        if not options.json:
            print(f"kept  {path}  (in use by {holder})")
    removals = [removal for removal in removals if removal.path not in holders]
    for removal in removals:
        if options.yes:
            try:
                _remove(removal.path)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(removal.path)) from None
        if not options.json:
            action = "removed" if options.yes else "would remove"
            print(f"{action}  {wording.size(removal.size):>9}  {removal.path}  ({removal.why})", flush=True)
    _print_summary(removals, options)
    return OK


def _print_summary(removals: Sequence[Removal], options: argparse.Namespace) -> None:
    if options.json:
        rows = [
            {"path": str(removal.path), "bytes": removal.size, "why": removal.why, "removed": bool(options.yes)}
            for removal in removals
        ]
        print(wording.to_json(rows))
    elif not removals:
        print("nothing to clean")
    elif not options.yes:
        total = wording.size(sum(removal.size for removal in removals))
        print(f"\n{total} in total; run the same command with --yes to delete it")


def _removals_of_run(run_dir: RunDir, *, checkpoints_only: bool) -> Iterator[Removal]:
    """Yield a run, or only the checkpoints that training no longer needs. Raises BadInput if the run is active."""
    plan = read_plan(run_dir)
    states = own_states(run_dir, plan, read_run(run_dir, plan, Queue(max_age=0)))
    cancel = f"{wording.program()} cancel {wording.name_of(run_dir)}"
    if is_driven(run_dir, states):
        raise BadInput(f"{plan.run_id} has running or pending jobs; stop it first: {cancel}")
    raise_if_unknown(states, "clean", f"nothing was removed; once Slurm answers, stop the run first: {cancel}")

    external = _external_checkpoints(run_dir, plan)
    if not checkpoints_only:
        yield Removal(run_dir.root, size_of(run_dir.root), "the run; shards that other runs may use are kept")
        for folder in external:
            yield Removal(folder, size_of(folder), "its checkpoints")
        return
    section = _checkpoint_section(run_dir)
    for folder in [run_dir.root / "checkpoints", *external]:
        for element in sorted(folder.iterdir()) if folder.is_dir() else []:
            for checkpoint in _unneeded_checkpoints(element, section):
                yield Removal(checkpoint, size_of(checkpoint), "an older checkpoint")


def _checkpoint_section(run_dir: RunDir) -> Checkpoint:
    """Return the checkpoint section of the run's recipe, whose rules say what is kept."""
    tree = read_object(run_dir.recipe_json).get("checkpoint") or {}
    return Checkpoint(**{field.name: tree[field.name] for field in fields(Checkpoint) if field.name in tree})


def _unneeded_checkpoints(root: Path, section: Checkpoint) -> list[Path]:
    """Return the checkpoints in ``root`` but the newest intact one, newer ones, and those that the recipe keeps.

    Empty without an intact one: a damaged one may be readable elsewhere.
    """
    for count, folder in enumerate(list_checkpoints(root), start=1):
        damage = find_damage(folder)
        if damage is None:
            return expired_checkpoints(root, replace(section, max_recent_checkpoints=count))
        print(f"warning: {folder} is damaged ({damage}); older checkpoints are kept", file=sys.stderr)
    return []


def _external_checkpoints(run_dir: RunDir, plan: Plan) -> list[Path]:
    """Return the folders outside the run where ``checkpoint.checkpoint_dir`` put its checkpoints."""
    folders = []
    for stage in plan.stages:
        for element in stage.elements if stage.name == "train" else []:
            arguments = element.arguments
            if "--checkpoints" not in arguments:
                continue
            folder = Path(arguments[arguments.index("--checkpoints") + 1])
            if not folder.is_relative_to(run_dir.root) and folder.parent.is_dir():
                folders.append(folder.parent)
    return list(dict.fromkeys(folders))


# --- leftovers


def _leftovers(folders: Iterable[Path]) -> Iterator[Removal]:
    """Yield what no run uses: shards, old checks of amlaunch doctor, and incomplete files of killed processes."""
    queue = Queue(max_age=0)
    folders = list({folder.resolve(): folder for folder in folders}.values())
    yield from _unused_shards(folders, queue)
    for folder in folders:
        checks = folder / "doctor"
        for check in sorted(checks.iterdir()) if checks.is_dir() else []:
            if check.is_dir() and _is_old(check) and not in_use(check, queue):
                yield Removal(check, size_of(check), "GPU check of amlaunch doctor, more than a day old")
        for run_dir in list_runs(folder):
            yield from _incomplete_files(run_dir.root)


def _unused_shards(folders: Sequence[Path], queue: Queue) -> Iterator[Removal]:
    """Yield the shards beside ``folders`` that belong to this user, and that no run uses or makes."""
    used = {shards.resolve() for run_dir in _neighbouring_runs(folders) for shards in (run_dir.data, run_dir.shared)}
    for data in dict.fromkeys(folder.resolve().parent / "data" for folder in folders if folder.is_dir()):
        for shards in sorted(data.iterdir()) if data.is_dir() else []:
            is_read = shards.resolve() in used or _has_readers(shards)
            is_candidate = not is_read and (shards / "stages").is_dir() and _is_own(shards)
            if is_candidate and not in_use(shards, queue):
                yield Removal(shards, size_of(shards), "shards that no run uses")


def _has_readers(shards: Path) -> bool:
    """Return True if a run on record beside the shards exists, or cannot be looked at."""
    for record in (shards / READERS).glob("*.json"):
        run = read_object(record).get("run")
        if not isinstance(run, str) or os.path.lexists(run) or not os.access(Path(run).parent, os.X_OK):
            return True
    return False


def _holders(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the files and folders in which a process of this machine has a file open or mapped, and that process.

    Processes of other users, which /proc hides, are not included.
    """
    real_paths = {path: path.resolve() for path in paths if not path.is_symlink()}
    holders: dict[Path, str] = {}
    for process in Path("/proc").glob("[0-9]*") if real_paths else ():
        if process.name == str(os.getpid()):
            continue
        # It may have ended meanwhile, or belong to another user.
        with suppress(OSError):
            opened = {line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines() if "/" in line}
            for descriptor in (process / "fd").iterdir():
                with suppress(OSError):
                    opened.add(os.readlink(descriptor))
            name = (process / "comm").read_text().strip()
            for path, real in real_paths.items():
                if any(file == str(real) or file.startswith(f"{real}/") for file in opened):
                    holders[path] = f"process {process.name} ({name})"
    return holders


def _neighbouring_runs(folders: Sequence[Path]) -> list[RunDir]:
    """Return the runs that may share shards with those in ``folders``: in all known folders and those beside them."""
    parents = {folder.resolve().parent for folder in folders}
    beside = [child for parent in parents if parent.is_dir() for child in parent.iterdir() if child.is_dir()]
    return list_runs(*dict.fromkeys(folder.resolve() for folder in [*folders, *roots(), *beside]))


def _is_own(folder: Path) -> bool:
    """Return True if this user created a folder. The runs of others, and what they use, may not be readable."""
    return folder.stat().st_uid == os.getuid()


def in_use(folder: Path, queue: Queue) -> bool:
    """Return True if a process or a job of any run is writing to a folder, or if that cannot be determined."""
    if any(is_locked(lock) for lock in [folder / "submit.lock", folder / "lock", *folder.glob("stages/*/*/lock")]):
        return True
    submissions = read_submissions(folder / "jobs")
    if not submissions:
        return False
    # Slurm may show users only their own jobs.
    if queue.jobs is None or not all(_is_own(submission.folder) for submission in submissions):
        return True
    active = [info for info in queue.jobs.values() if info.active]
    known = {info.comment for info in active} | {info.id.split("_")[0] for info in active}
    return any(submission.token in known or submission.job in known for submission in submissions)


def _incomplete_files(root: Path) -> Iterator[Removal]:
    """Yield old temporary files and folders of a run."""
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder) / name
            is_temporary = name.endswith(".tmp") or (name.startswith(".code.") and Path(folder) == root)
            if is_temporary and not path.is_symlink() and _is_old(path):
                yield Removal(path, size_of(path), "temporary file, more than a day old")
        folders[:] = [name for name in folders if not name.endswith(".tmp")]


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > MIN_LEFTOVER_SECONDS
    except OSError:
        # A heartbeat was renamed to its final name.
        return False


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder; links are not followed."""
    if not path.is_dir() or path.is_symlink():
        return path.lstat().st_size
    return sum(entry.lstat().st_size for entry in path.rglob("*") if not entry.is_dir() or entry.is_symlink())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
