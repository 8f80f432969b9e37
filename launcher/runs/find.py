"""Find run directories, list them, and read their plans."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from amlaunch.launcher.specs.plan import Plan
from amlaunch.launcher.specs.profile_files import profile_files
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import read_json
from amlaunch.recipes.run_layout import RunDir
from amlaunch.recipes.suggestions import did_you_mean
from amlaunch.recipes.version import VERSION


def runs_root(option: str | None = None, profile_runs: str | None = None) -> Path:
    """Return the folder of new runs: ``--runs``, else ``AMLAUNCH_RUNS``, else the profile's, else ``./runs``."""
    return Path(option or os.environ.get("AMLAUNCH_RUNS") or profile_runs or "runs").expanduser().absolute()


def roots(option: str | None = None) -> list[Path]:
    """Return the folders in which to look for runs: :func:`runs_root`, and those of all cluster profiles."""
    if option:
        return [runs_root(option)]
    return list(dict.fromkeys([runs_root(), *(Path(folder).expanduser().absolute() for folder in _profile_roots())]))


def _profile_roots() -> list[str]:
    if not profile_files():
        # Without importing the YAML reader.
        return []
    from amlaunch.launcher.specs.cluster_profile import readable_profiles

    return [profile.runs for profile in readable_profiles() if profile.runs]


def list_runs(*folders: Path) -> list[RunDir]:
    """Return all runs below ``folders``, the newest first."""
    runs: list[RunDir] = []
    for folder in folders:
        try:
            runs += [RunDir(path) for path in folder.iterdir() if _is_run(path)]
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
    return sorted(runs, key=lambda run: run.plan.stat().st_mtime, reverse=True)


def _is_run(path: Path) -> bool:
    try:
        return (path / "plan.json").is_file()
    except PermissionError:
        # A colleague's private run must not hide the others.
        return False


def find_run(folders: Iterable[Path], name: str, *, only: bool = False) -> RunDir:
    """Find a run by its ID, the start of its ID, its recipe's name (the newest), or its path.

    ``only``: several runs of one recipe are ambiguous, too. Raises BadInput with the nearest name.
    """
    # An unset shell variable would match any run.
    if not name.strip():
        raise BadInput("the run name is empty; list the runs: amlaunch status")
    path = Path(name).expanduser()
    if (path / "plan.json").is_file():
        return RunDir(path.resolve())
    folders = list(folders)
    runs = list_runs(*folders)
    matches = [run for run in runs if name in (run.root.name, _recipe_name(run))]
    matches = matches or [run for run in runs if run.root.name.startswith(name)]
    if not matches:
        hint = "start one: amlaunch local or submit"
        if runs:
            hint = did_you_mean(name, [run.root.name for run in runs])
        raise BadInput(f"no run {name!r} in {', '.join(map(str, folders))}; {hint}")
    if len({run.root.resolve() if only else _recipe_name(run) for run in matches}) > 1:
        names = [str(run.root) if only else run.root.name for run in matches]
        raise BadInput(f"{name!r} matches several runs; name one of them: {', '.join(names)}")
    return matches[0]


def _recipe_name(run: RunDir) -> str:
    return run.root.name.rpartition("-")[0]


def read_plan(run: RunDir) -> Plan:
    """Read the plan of a run. Raises BadInput if it is damaged, or gone with its folder."""
    try:
        tree = read_json(run.plan)
        if tree is None:
            raise BadInput(f"{run.root} is no longer a run: it has no {run.plan.name}; it was deleted or moved")
        return Plan.from_json(tree)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{run.plan}: amlaunch {VERSION} cannot read this plan ({error!r}); start the run again with the command "
            f"in {run.provenance}"
        ) from None
