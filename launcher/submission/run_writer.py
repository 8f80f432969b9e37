"""Make a run directory: recipe, plan, code snapshot, provenance."""

from __future__ import annotations

import getpass
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amlaunch.launcher.planning.stage_container import images_of, inside_of
from amlaunch.launcher.runs.snapshot import SKIPPED, checkout, take_snapshot
from amlaunch.launcher.runs.stored_recipe import RESUMED, resumed_with
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import write_json, write_text
from amlaunch.recipes.format.loader import LoadedRecipe, file_targets, is_secret
from amlaunch.recipes.format.targets import split_target
from amlaunch.recipes.run_layout import RunDir
from amlaunch.recipes.version import VERSION

VERSIONS_OF = ("torch", "numpy", "submitit", "tiktoken", "datasets", "transformers", "safetensors", "pyyaml", "rich")
MAX_DIFF = 1_000_000


def write_run(run: RunDir, loaded: LoadedRecipe, plan: Plan, command: Sequence[str], *, refresh_code: bool) -> None:
    """Make or renew a run directory; each file appears whole.

    ``refresh_code`` is False while an element of an earlier start still runs
    on the snapshot that is there.
    """
    run.root.mkdir(parents=True, exist_ok=True)
    if refresh_code or not run.code.is_dir():
        take_snapshot(
            run.code,
            loaded.policy.folder if file_targets(loaded.tree) else None,
            inside_of(loaded, plan.stages, images_of(plan)),
        )
        _check_targets(run, loaded)
    write_text(
        run.recipe,
        f"# {str(loaded.path)!r}, resolved by amlaunch {VERSION}; placeholders are filled in when a job starts\n"
        + loaded.text(),
    )
    write_json(run.plan, plan.to_json())
    if not run.provenance.exists() or refresh_code:
        write_json(run.provenance, {**provenance(loaded, command), RESUMED: resumed_with(run)})
    if plan.data:
        _link(run.data, Path(plan.data))
    if plan.shared:
        _link(run.shared, Path(plan.shared))


def _check_targets(run: RunDir, loaded: LoadedRecipe) -> None:
    """Each file that the recipe names must have come into the snapshot; absolute ones are used where they lie."""
    for name in file_targets(loaded.tree):
        copy = run.code / "recipe" / split_target(name)[0]
        if not copy.is_file():
            raise BadInput(
                f"{name!r}: its folder is not one that is copied for a run (hidden, or one of {', '.join(sorted(SKIPPED))}); move the file"
            )


def _link(link: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and link.resolve() == target.resolve():
        return
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def provenance(loaded: LoadedRecipe, command: Sequence[str]) -> dict[str, Any]:
    """Who ran what, where, with which versions and which code."""
    versions = {"amlaunch": VERSION, "python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "time": time.time(),
        "command": redact(command),
        "recipe": str(loaded.path.resolve()),
        "cwd": os.getcwd(),
        "user": getpass.getuser() if _has_user() else str(os.getuid()),
        "host": platform.node(),
        "python": sys.executable,
        "versions": versions,
        "git": _git(checkout()),
    }


def _has_user() -> bool:
    try:
        getpass.getuser()
    except (KeyError, OSError):  # a container that runs under a bare number
        return False
    return True


def redact(command: Sequence[str]) -> list[str]:
    """The command line with the values of secret-looking options blotted out."""
    shown: list[str] = []
    hide = False
    for word in command:
        option, equals, _ = word.partition("=")
        secret = word.startswith("--") and is_secret(option[2:].rpartition(".")[2])
        shown.append("***" if hide else f"{option}=***" if secret and equals else word)
        hide = secret and not equals
    return shown


def _git(folder: Path) -> dict[str, str] | None:
    """Commit and uncommitted changes of the checkout that amlaunch runs from; None for an installed package."""

    def ask(*arguments: str) -> str:
        found = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
        return found.stdout if found.returncode == 0 else ""

    if not (folder / ".git").exists():
        return None
    try:
        return {"commit": ask("rev-parse", "HEAD").strip(), "diff": ask("diff", "HEAD")[:MAX_DIFF]}
    except (OSError, subprocess.TimeoutExpired):
        return None
