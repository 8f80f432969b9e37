"""Copy the code that a run executes, so that later edits do not affect the run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import amlaunch
from amlaunch import PACKAGES_FILE
from amlaunch.recipes.errors import BadInput

# Only a run in an image needs it.
if TYPE_CHECKING:
    from amlaunch.launcher.runs.packages import ImagePackages

SUBPACKAGES = ("recipes", "containers", "preprocess", "trainer", "launcher")
PACKAGES_FOLDER = Path("packages")
"""Folder of a snapshot for packages that the image lacks; ``amlaunch/__init__.py`` appends it to ``sys.path``."""
SKIPPED = {"__pycache__", "node_modules", "site-packages", "venv", "env", "runs", "data", "checkpoints"}
"""Names of folders that are not copied."""
MAX_FILES = 500
MAX_BYTES = 20_000_000
MAX_LISTED_FILES = 3
GIT_SECONDS = 60


def package_root() -> Path:
    """Return the folder that contains the package ``amlaunch``: the entry of ``sys.path``."""
    return Path(amlaunch.__file__).absolute().parents[1]


def checkout() -> Path:
    """Return the root of the repository if amlaunch runs from one: the package's parts are links to its folders."""
    return Path(__file__).resolve().parents[2]


def take_snapshot(target: Path, recipe_folder: Path | None, inside: ImagePackages | None = None) -> None:
    """Copy the package to ``target``, the recipe's folder to ``target/recipe``, and ``inside`` to ``target/packages``.

    ``inside``: the packages that an image lacks. The snapshot appears atomically; an identical one is left as it is.
    Raises BadInput if the recipe's folder holds too much to be its code.
    """
    files = {source.relative_to(package_root()): source for source in _package_files()}
    if recipe_folder is not None:
        files |= {Path("recipe") / source.relative_to(recipe_folder): source for source in _user_files(recipe_folder)}
    record = ""
    if inside is not None:
        files |= {PACKAGES_FOLDER / name: source for name, source in inside.files().items()}
        record = json.dumps(inside.record(), indent=2) + "\n"
    digest = _digest(files, record)
    mark = target / ".digest"
    if mark.is_file() and mark.read_text() == digest:
        return

    with _replaced(target) as new:
        _copy(files, new)
        if record:
            (new / PACKAGES_FOLDER).mkdir(exist_ok=True)
            (new / PACKAGES_FOLDER / PACKAGES_FILE).write_text(record)
        (new / ".digest").write_text(digest)


def replace_packages(code: Path, inside: ImagePackages | None) -> None:
    """Replace the packages of a snapshot if the images of the run lack others now; its code stays."""
    packages = code / PACKAGES_FOLDER
    record = json.dumps(inside.record(), indent=2) + "\n" if inside is not None else ""
    known = packages / PACKAGES_FILE
    if not record or (known.is_file() and known.read_text() == record):
        return
    with _replaced(packages) as new:
        _copy(inside.files() if inside is not None else {}, new)
        new.mkdir(exist_ok=True)
        (new / PACKAGES_FILE).write_text(record)
    # It no longer describes the snapshot.
    (code / ".digest").unlink(missing_ok=True)


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """Yield the path of a folder to make, which then replaces ``target``."""
    new = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    yield new
    # Deleting takes long, and a kill in between must leave a snapshot: set the old one aside first.
    old = new.with_name(f"{new.name}.old")
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def upgrade_snapshot(code: Path) -> bool:
    """Add the package to a snapshot from before amlaunch was one package; return True if that was necessary.

    Such a snapshot has ``launcher/``, ``trainer/`` etc. at its top. They stay for jobs that are still queued.
    """
    package = code / "amlaunch"
    if not code.is_dir() or package.exists():
        return False
    new = code.with_name(f".{code.name}.{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    _copy({source.relative_to(package_root() / "amlaunch"): source for source in _package_files()}, new)
    new.rename(package)
    return True


def _copy(files: Mapping[Path, Path], target: Path) -> None:
    for name, source in files.items():
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)


def _package_files() -> Iterable[Path]:
    package = package_root() / "amlaunch"
    yield from (package / "__init__.py", package / "__main__.py")
    # Each may be a link, which rglob follows only as its root.
    for part in SUBPACKAGES:
        for path in sorted((package / part).rglob("*")):
            if path.suffix in (".py", ".yaml", ".sh") and "__pycache__" not in path.parts:
                yield path


def _user_files(folder: Path) -> list[Path]:
    """Return the code beside a recipe: in a git checkout all files that are not ignored, otherwise the Python files.

    Uncommitted and untracked files count. Raises BadInput if that is more than the code of a recipe can be.
    """
    files = _git_files(folder)
    if files is None:
        files = list(_python_files(folder))
    sizes = {path: path.stat().st_size for path in files}
    if len(files) <= MAX_FILES and sum(sizes.values()) <= MAX_BYTES:
        return files
    largest = sorted(files, key=lambda path: -sizes[path])[:MAX_LISTED_FILES]
    shown = ", ".join(f"{path.relative_to(folder)} ({sizes[path] / 1e6:.1f} MB)" for path in largest)
    raise BadInput(
        f"{folder} holds {len(files)} files ({sum(sizes.values()) / 1e6:.0f} MB), too much to copy for each run "
        f"(limit: {MAX_FILES} files and {MAX_BYTES // 10**6} MB); move the recipe and the files that it names into "
        f"their own folder, or let git ignore the rest. The largest: {shown}"
    )


def _git_files(folder: Path) -> list[Path] | None:
    """Return the files below ``folder`` that git does not ignore; None without git, or if it is no checkout."""
    tracked, untracked = _git_list(folder, "--cached"), _git_list(folder, "--others", "--exclude-standard")
    if tracked is None or untracked is None:
        return None
    # Leave out our own ./runs.
    untracked_code = [name for name in untracked if not SKIPPED & set(name.split("/"))]
    paths = (folder / name for name in [*tracked, *untracked_code])
    # Git lists deleted files, too.
    return sorted({path for path in paths if path.is_file() and not path.is_symlink()})


def _git_list(folder: Path, *options: str) -> list[str] | None:
    command = ["git", "-C", str(folder), "ls-files", "-z", *options]
    try:
        process = subprocess.run(command, capture_output=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if process.returncode:
        return None
    return [os.fsdecode(name) for name in process.stdout.split(b"\0") if name]


def _python_files(folder: Path) -> Iterable[Path]:
    count = 0
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("."))
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(root) / name
                count += 1
        # Somebody's home: report that before all of it is read.
        if count > MAX_FILES:
            return


def _digest(files: Mapping[Path, Path], record: str) -> str:
    digest = hashlib.sha256(record.encode())
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
