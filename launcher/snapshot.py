"""The code that a run executes: a copy taken when it is started, whatever is edited later."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from recipes.errors import BadInput

PACKAGES = ("recipes", "containers", "preprocess", "trainer", "launcher")
SKIPPED = {"__pycache__", "node_modules", "site-packages", "venv", "env", "runs", "data", "checkpoints"}
MAX_FILES = 500
MAX_BYTES = 20_000_000


def package_root() -> Path:
    """The folder that holds our packages."""
    return Path(__file__).resolve().parent.parent


def take_snapshot(target: Path, recipe_folder: Path | None) -> None:
    """Copy our packages to ``target``, and the Python files of ``recipe_folder`` to ``target/recipe``.

    Appears whole (built aside, then renamed); a snapshot that is the same already stays as it is.
    Raises BadInput where the recipe's folder holds too much to be its code.
    """
    files = {source.relative_to(package_root()): source for source in _package_files()}
    if recipe_folder is not None:
        files |= {Path("recipe") / source.relative_to(recipe_folder): source for source in _user_files(recipe_folder)}
    digest = _digest(files)
    mark = target / ".digest"
    if mark.is_file() and mark.read_text() == digest:
        return
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    for name, source in files.items():
        copy = aside / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
    (aside / ".digest").write_text(digest)
    shutil.rmtree(target, ignore_errors=True)
    aside.rename(target)


def _package_files() -> Iterable[Path]:
    for package in PACKAGES:
        for path in sorted((package_root() / package).rglob("*")):
            if path.suffix in (".py", ".yaml") and "__pycache__" not in path.parts:
                yield path


def _user_files(folder: Path) -> list[Path]:
    found: list[Path] = []
    size = 0
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in SKIPPED and not name.startswith("."))
        for name in sorted(names):
            if name.endswith(".py"):
                found.append(Path(root) / name)
                size += found[-1].stat().st_size
        if len(found) > MAX_FILES or size > MAX_BYTES:
            raise BadInput(
                f"{folder} holds more than {MAX_FILES} Python files or {MAX_BYTES // 10**6} MB of them, too much to copy for "
                "each run; put the recipe and the files it names into a folder of their own"
            )
    return found


def _digest(files: dict[Path, Path]) -> str:
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
