"""Write a run directory: recipe, plan, code snapshot, provenance, and the secrets that jobs need."""

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

from amlaunch.launcher.planning.container_plan import image_packages, profile_image_folder
from amlaunch.launcher.planning.run_sources import ResolvedRun, StartKind
from amlaunch.launcher.runs.element_state import ElementState
from amlaunch.launcher.runs.snapshot import SKIPPED, checkout, replace_packages, take_snapshot, upgrade_snapshot
from amlaunch.launcher.runs.states import ACTIVE_STATES
from amlaunch.launcher.runs.stored_recipe import RESUMED, add_resumed, resumed_with
from amlaunch.launcher.specs.cluster_profile import ClusterProfile
from amlaunch.launcher.specs.plan import Plan
from amlaunch.launcher.submission.preflight import Say
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import fingerprint, read_object, write_json, write_private, write_text
from amlaunch.recipes.format.loader import LoadedRecipe, file_targets
from amlaunch.recipes.format.placeholders import PLACEHOLDER
from amlaunch.recipes.format.secret_keys import is_secret, is_secret_variable
from amlaunch.recipes.format.targets import split_target
from amlaunch.recipes.run_layout import READERS, RunDir
from amlaunch.recipes.version import VERSION

RECORDED_PACKAGES = (
    "torch", "numpy", "submitit", "tiktoken", "datasets", "transformers", "safetensors", "pyyaml", "rich",
)  # fmt: skip
"""Packages whose versions the provenance records."""
MAX_DIFF_CHARACTERS = 1_000_000
LIBRARY_SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Secrets that our libraries read from the environment by themselves."""


def write_start(run: ResolvedRun, argv: Sequence[str], states: Sequence[ElementState], say: Say) -> None:
    """Write what a start changes in the run directory; a retry changes nothing but a snapshot of an old layout.

    ``states`` are the current ones: while an element is active, its code snapshot stays.
    """
    if upgrade_snapshot(run.run_dir.code):
        say(f"note: the code snapshot is from an earlier amlaunch; added the current version: {run.run_dir.code}")
    if run.kind is StartKind.RETRY:
        # Its recipe.yaml may have been edited.
        write_json(run.run_dir.recipe_json, run.loaded.tree)
        link_data(run.run_dir, run.plan)
        return
    if run.kind is StartKind.RESUME:
        _set_done_markers_aside(run)
        images = profile_image_folder(run.plan)
        replace_packages(run.run_dir.code, image_packages(run.loaded, run.plan.stages, images))
        write_run(run.run_dir, run.loaded, run.plan, argv, refresh_code=False)
        add_resumed(run.run_dir, run.overrides)
        return

    is_active = any(state.state in ACTIVE_STATES for state in states)
    write_run(run.run_dir, run.loaded, run.plan, argv, refresh_code=not is_active)
    if is_active:
        # The snapshot and its provenance stay, but retry and resume follow the newest command.
        provenance = read_object(run.run_dir.provenance)
        write_json(run.run_dir.provenance, {**provenance, "command": redact(argv), "cwd": os.getcwd()})


def _set_done_markers_aside(run: ResolvedRun) -> None:
    """Rename the done markers of the stages that continue; checkpoints stay."""
    for stage in run.plan.stages:
        for element in stage.elements if stage.name in run.restarted_stages else []:
            marker = run.run_dir.element(stage.name, element.name).done
            if marker.exists():
                marker.replace(marker.with_name(f"done.before-{int(marker.stat().st_mtime)}.json"))


def write_run(run: RunDir, loaded: LoadedRecipe, plan: Plan, argv: Sequence[str], *, refresh_code: bool) -> None:
    """Create or update a run directory; each file is replaced atomically.

    ``refresh_code`` replaces the code snapshot. Raises BadInput if the recipe's own code cannot be copied.
    """
    run.root.mkdir(parents=True, exist_ok=True)
    if refresh_code or not run.code.is_dir():
        recipe_folder = loaded.policy.folder if file_targets(loaded.tree) else None
        take_snapshot(run.code, recipe_folder, image_packages(loaded, plan.stages, profile_image_folder(plan)))
        _check_targets(run, loaded)

    header = f"# {str(loaded.path)!r}, resolved by amlaunch {VERSION}; placeholders are filled in when a job starts\n"
    write_text(run.recipe, header + loaded.text())
    write_json(run.recipe_json, loaded.tree)
    write_json(run.plan, plan.to_json())
    if refresh_code or not run.provenance.exists():
        write_json(run.provenance, {**provenance_of(loaded, argv), RESUMED: resumed_with(run)})
    link_data(run, plan)


def link_data(run: RunDir, plan: Plan) -> None:
    """Link a run to its shards, and record the run beside them: they may be reached by other paths, too."""
    if plan.shared:
        _link(run.shared, Path(plan.shared))
    if plan.data:
        _link(run.data, Path(plan.data))
        reader = str(run.root.resolve())
        # Nothing can be recorded beside read-only shards of someone else.
        if os.access(run.data, os.W_OK):
            write_json(run.data.resolve() / READERS / f"{fingerprint(reader)}.json", {"run": reader})


def _check_targets(run: RunDir, loaded: LoadedRecipe) -> None:
    """Raise BadInput if a file that the recipe names is missing in the snapshot; absolute paths are used in place."""
    for name in file_targets(loaded.tree):
        copy = run.code / "recipe" / split_target(name)[0]
        if not copy.is_file():
            raise BadInput(
                f"{name!r}: the code snapshot skips this folder (hidden, or one of {', '.join(sorted(SKIPPED))}); "
                "move the file to another folder"
            )


def _link(link: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    if link.is_symlink() and link.resolve() == target.resolve():
        return
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def provenance_of(loaded: LoadedRecipe, argv: Sequence[str]) -> dict[str, Any]:
    """Return who started what, where, with which versions and which code."""
    versions = {"amlaunch": VERSION, "python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "time": time.time(),
        "command": redact(argv),
        "recipe": str(loaded.path.resolve()),
        "cwd": os.getcwd(),
        "user": _user_name(),
        "host": platform.node(),
        "python": sys.executable,
        "versions": versions,
        "git": _git_state(checkout()),
    }


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container that runs under a user ID without a name.
        return str(os.getuid())


def redact(argv: Sequence[str]) -> list[str]:
    """Return a command line with the values of secrets replaced by ``***``."""
    redacted: list[str] = []
    hide_next = False
    for word in argv:
        option, equals, _ = word.partition("=")
        is_secret_option = word.startswith("--") and is_secret(option[2:].rpartition(".")[2])
        if hide_next:
            redacted.append("***")
        elif is_secret_option and equals:
            redacted.append(f"{option}=***")
        else:
            redacted.append(word)
        hide_next = is_secret_option and not equals
    return redacted


def _git_state(folder: Path) -> dict[str, str] | None:
    """Return the commit and the uncommitted changes of amlaunch's checkout; None for an installed package."""
    if not (folder / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        process = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
        return process.stdout if process.returncode == 0 else ""

    try:
        return {"commit": git("rev-parse", "HEAD").strip(), "diff": git("diff", "HEAD")[:MAX_DIFF_CHARACTERS]}
    except (OSError, subprocess.TimeoutExpired):
        return None


def write_environment(run: RunDir, loaded: LoadedRecipe, profile: ClusterProfile) -> list[str]:
    """Write the secrets that jobs need into a file that only the user can read; return their names.

    Raises BadInput if the profile requires a variable that neither the shell nor an earlier start has set.
    """
    stored = read_object(run.environment)
    placeholders = PLACEHOLDER.findall(loaded.text()) + PLACEHOLDER.findall("\n".join(profile.env.values()))
    names = {name for name, _ in placeholders if is_secret_variable(name)} | set(LIBRARY_SECRETS)
    for name in profile.pass_env:
        if name not in os.environ and name not in stored:
            raise BadInput(f"the profile's pass_env lists {name}, which is not set in this shell; export {name}=…")
        names.add(name)

    values = {name: os.environ[name] for name in sorted(names) if name in os.environ}
    # Jobs of an earlier submit may still need theirs.
    write_private(run.environment, {**stored, **values})
    return list(values)
