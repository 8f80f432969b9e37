"""Run directories: find one, list them, read a plan."""

from __future__ import annotations

import os
from pathlib import Path

from launcher.plan import Plan
from recipes.errors import BadInput, did_you_mean
from recipes.files import read_json
from recipes.rundir import RunDir
from recipes.version import VERSION


def runs_root(given: str | None = None) -> Path:
    """``--runs``, else ``AMLAUNCH_RUNS``, else ``./runs``; absolute."""
    return Path(given or os.environ.get("AMLAUNCH_RUNS") or "runs").expanduser().absolute()


def list_runs(root: Path) -> list[RunDir]:
    """All runs below ``root``, newest first."""
    try:
        found = [RunDir(path) for path in root.iterdir() if (path / "plan.json").is_file()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(found, key=lambda run: run.plan.stat().st_mtime, reverse=True)


def find_run(root: Path, name: str) -> RunDir:
    """A run by its id, the start of one, its recipe's name (the newest), or its path. BadInput with the nearest."""
    path = Path(name).expanduser()
    if (path / "plan.json").is_file():
        return RunDir(path.resolve())
    runs = list_runs(root)
    exact = [run for run in runs if run.root.name == name or run.root.name.rpartition("-")[0] == name]
    starts = exact or [run for run in runs if run.root.name.startswith(name)]
    if not starts:
        hint = did_you_mean(name, [run.root.name for run in runs]) if runs else "there are none yet: amlaunch local starts one"
        raise BadInput(f"no run {name!r} in {root}; {hint}")
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
