"""Run directories: find one, list them, read a plan."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from amlaunch.launcher.specs.plan import Plan
from amlaunch.launcher.specs.profile_files import profile_files
from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.files import read_json
from amlaunch.recipes.run_layout import RunDir
from amlaunch.recipes.version import VERSION


def runs_root(given: str | None = None, site: str | None = None) -> Path:
    """``--runs``, else ``AMLAUNCH_RUNS``, else the ``runs`` of a cluster's profile, else ``./runs``; absolute."""
    return Path(given or os.environ.get("AMLAUNCH_RUNS") or site or "runs").expanduser().absolute()


def roots(given: str | None = None) -> list[Path]:
    """Where to look for runs: :func:`runs_root`, and where the profiles of clusters put theirs."""
    if given:
        return [runs_root(given)]
    return list(dict.fromkeys([runs_root(), *(Path(folder).expanduser().absolute() for folder in _profile_roots())]))


def _profile_roots() -> list[str]:
    files = profile_files()
    if not files:
        return []  # and nothing that reads YAML is loaded
    from amlaunch.launcher.specs.cluster_profile import check_profile
    from amlaunch.recipes.format.yaml_reader import read_file

    found = []
    for path in files:
        try:
            tree, _ = read_file(path)
            found += [check_profile(profile or {}, {}).runs for profile in tree.values()]
        except (BadInput, AttributeError):
            continue  # whoever uses that profile is told what is wrong with it
    return [folder for folder in found if folder]


def run_dir_of(options: argparse.Namespace, plan: Plan) -> RunDir:
    """The run directory of a plan that was just made."""
    return RunDir(runs_root(options.runs) / plan.run_id, Path(plan.shared) if plan.shared else None)


def list_runs(*places: Path) -> list[RunDir]:
    """All runs below ``places``, newest first."""
    found: list[RunDir] = []
    for root in places:
        try:
            found += [RunDir(path) for path in root.iterdir() if _is_run(path)]
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
    return sorted(found, key=lambda run: run.plan.stat().st_mtime, reverse=True)


def _is_run(path: Path) -> bool:
    try:
        return (path / "plan.json").is_file()
    except PermissionError:  # of a colleague who keeps it to himself; it hides none of the others
        return False


def find_run(places: Iterable[Path], name: str) -> RunDir:
    """A run by its id, the start of one, its recipe's name (the newest), or its path. BadInput with the nearest."""
    if not name.strip():  # an unset variable of a shell, which would stand for any run
        raise BadInput("the name of the run is empty")
    path = Path(name).expanduser()
    if (path / "plan.json").is_file():
        return RunDir(path.resolve())
    places = list(places)
    runs = list_runs(*places)
    exact = [run for run in runs if run.root.name == name or run.root.name.rpartition("-")[0] == name]
    starts = exact or [run for run in runs if run.root.name.startswith(name)]
    if not starts:
        hint = (
            did_you_mean(name, [run.root.name for run in runs])
            if runs
            else "there are none yet: amlaunch local or submit starts one"
        )
        raise BadInput(f"no run {name!r} in {', '.join(map(str, places))}; {hint}")
    names = {run.root.name.rpartition("-")[0] for run in starts}
    if len(names) > 1:
        raise BadInput(f"{name!r} fits several runs: {', '.join(run.root.name for run in starts)}")
    return starts[0]


def read_plan(run: RunDir) -> Plan:
    """The plan stored in a run directory. BadInput where it is damaged."""
    try:
        return Plan.from_json(read_json(run.plan) or {})
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{run.plan}: not a plan that amlaunch {VERSION} can read ({error})") from None
