"""The code that a run executes: a copy taken when it is started, whatever is edited later."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import amlaunch
from amlaunch import PACKAGES_FILE
from amlaunch.recipes.errors import BadInput

if TYPE_CHECKING:  # only a run in an image needs it
    from amlaunch.launcher.runs.packages import Inside

PARTS = ("recipes", "containers", "preprocess", "trainer", "launcher")
EXTRA = Path("packages")
"""Where a snapshot has what its image lacks; amlaunch/__init__.py puts it at the end of ``sys.path``."""
SKIPPED = {"__pycache__", "node_modules", "site-packages", "venv", "env", "runs", "data", "checkpoints"}
MAX_FILES = 500
MAX_BYTES = 20_000_000


def package_root() -> Path:
    """Return the folder that holds the package ``amlaunch``: what a process has on its path."""
    return Path(amlaunch.__file__).absolute().parents[1]


def checkout() -> Path:
    """Return the root of the repository, if amlaunch runs from one: the parts of the package are links to its folders."""
    return Path(__file__).resolve().parents[2]


def take_snapshot(target: Path, recipe_folder: Path | None, inside: Inside | None = None) -> None:
    """Copy our packages to ``target``, the code beside the recipe (``recipe_folder``) to ``target/recipe``, and what an
    image lacks (``inside``) to ``target/packages``.

    Appears whole (built aside, then renamed); a snapshot that is the same already stays as it is.
    Raises BadInput where the recipe's folder holds too much to be its code.
    """
    files = {source.relative_to(package_root()): source for source in _package_files()}
    if recipe_folder is not None:
        files |= {Path("recipe") / source.relative_to(recipe_folder): source for source in _user_files(recipe_folder)}
    record = ""
    if inside is not None:
        files |= {EXTRA / name: source for name, source in inside.files().items()}
        record = json.dumps(inside.record(), indent=2) + "\n"
    digest = _digest(files, record)
    mark = target / ".digest"
    if mark.is_file() and mark.read_text() == digest:
        return
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    for name, source in files.items():
        copy = aside / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    if record:
        (aside / EXTRA).mkdir(exist_ok=True)
        (aside / EXTRA / PACKAGES_FILE).write_text(record)
    (aside / ".digest").write_text(digest)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def _package_files() -> Iterable[Path]:
    package = package_root() / "amlaunch"
    yield from (package / "__init__.py", package / "__main__.py")
    for part in PARTS:  # each may be a link, which rglob follows only as its root
        for path in sorted((package / part).rglob("*")):
            if path.suffix in (".py", ".yaml") and "__pycache__" not in path.parts:
                yield path


def _user_files(folder: Path) -> list[Path]:
    """The code beside a recipe: of a git checkout every file that is not ignored (uncommitted and untracked ones
    included), else the Python files.

    Raises BadInput where that is more than the code of a recipe can be.
    """
    found = _of_git(folder)
    found = list(_python_files(folder)) if found is None else found
    sizes = {path: path.stat().st_size for path in found}
    if len(found) > MAX_FILES or sum(sizes.values()) > MAX_BYTES:
        largest = ", ".join(
            f"{path.relative_to(folder)} ({sizes[path] / 1e6:.1f} MB)"
            for path in sorted(found, key=lambda path: -sizes[path])[:3]
        )
        raise BadInput(
            f"{folder} holds {len(found)} files of {sum(sizes.values()) / 1e6:.0f} MB, too much to copy for each run (at most {MAX_FILES} and "
            f"{MAX_BYTES // 10**6} MB); put the recipe and the files it names into a folder of their own, or have git ignore the rest. The largest: {largest}"
        )
    return found


def _of_git(folder: Path) -> list[Path] | None:
    """What git would not ignore below ``folder``; None where it is no checkout, or there is no git."""
    tracked, untracked = _listed(folder, "--cached"), _listed(folder, "--others", "--exclude-standard")
    if tracked is None or untracked is None:
        return None
    new = [name for name in untracked if not SKIPPED & set(name.split("/"))]  # such as our own ./runs
    paths = (folder / name for name in [*tracked, *new])
    return sorted({path for path in paths if path.is_file() and not path.is_symlink()})  # deleted ones are listed, too


def _listed(folder: Path, *options: str) -> list[str] | None:
    try:
        found = subprocess.run(["git", "-C", str(folder), "ls-files", "-z", *options], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if found.returncode else [os.fsdecode(name) for name in found.stdout.split(b"\0") if name]


def _python_files(folder: Path) -> Iterable[Path]:
    count = 0
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("."))
        for name in sorted(names):
            if name.endswith(".py"):
                yield Path(root) / name
                count += 1
        if count > MAX_FILES:  # somebody's home: it is said before all of it is read
            return


def _digest(files: dict[Path, Path], record: str) -> str:
    digest = hashlib.sha256(record.encode())
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
