"""Share arguments between commands, and turn what was typed into typed requests."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from amlaunch.launcher.planning.run_request import RunRequest
from amlaunch.launcher.runs.states import State
from amlaunch.recipes.errors import BadInput

if TYPE_CHECKING:
    from amlaunch.launcher.runs.element_state import ElementState
    from amlaunch.launcher.specs.plan import Plan
    from amlaunch.recipes.run_layout import RunDir

RUN_HELP = "ID of a run, the beginning of the ID, the name of its recipe, or its directory"
RECIPE_HELP = "a YAML file, or the name of a recipe that comes with amlaunch"


def accept_overrides(parser: argparse.ArgumentParser, synopsis: str) -> None:
    """Let a command take overrides of a recipe: ``--section.key VALUE``."""
    parser.set_defaults(overrides=[])
    parser.usage = f"{parser.prog} {synopsis} [options] [--section.key VALUE ...]"


def add_json(parser: argparse.ArgumentParser, text: str = "print JSON on stdout") -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help=text)


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Add ``--runs``, the folder of run directories."""
    parser.add_argument(
        "--runs",
        metavar="DIR",
        help="folder of the run directories (default: $AMLAUNCH_RUNS, the runs of the cluster profile, or ./runs)",
    )


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names one run."""
    parser.add_argument("run", help=RUN_HELP)
    add_runs(parser)


def add_wait(parser: argparse.ArgumentParser) -> None:
    """Add ``--wait``."""
    parser.add_argument(
        "--wait", action="store_true", help="wait until the run has ended; the exit code tells how it ended"
    )


def add_allow_target(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-target``."""
    parser.add_argument(
        "--allow-target", action="append", default=[], metavar="NAME", help="let _target_ use NAME as well"
    )


def add_new_run(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the commands that resolve a recipe: local, submit, show."""
    parser.add_argument("recipe", nargs="?", help=RECIPE_HELP)
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="GPUs per node to train on; 0 trains on the CPU (default: the recipe's, if available)",
    )
    parser.add_argument("--stage", metavar="S", help="only this stage")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="train once for each value (repeat it for a grid)",
    )
    add_allow_target(parser)
    add_runs(parser)
    add_json(parser, "print the result as JSON on stdout")
    accept_overrides(parser, "[RECIPE]")


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose a checkpoint of a run."""
    add_run(parser)
    parser.add_argument("--element", metavar="E", help="in a sweep: the element (sweep point) to use")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--step", type=int, metavar="N", help="the checkpoint after this step (default: the newest)")
    choice.add_argument("--best", action="store_true", help="the checkpoint with the lowest validation loss")


def sweep_overrides(axes: Sequence[str]) -> list[str]:
    """Turn ``--sweep optimizer.lr=1e-4,3e-4`` into overrides of the recipe's ``sweep``; a mapping is passed unchanged.

    Raises BadInput for an axis that is malformed or repeated.
    """
    overrides = []
    for axis in axes:
        key, equals, values = axis.partition("=")
        if axis.lstrip().startswith("{") or axis.strip() in ("null", "none"):
            overrides.append(f"--sweep={axis}")
        elif not equals or not values or not key.strip():
            raise BadInput(f"--sweep {axis}: expected KEY=V1,V2, such as optimizer.lr=1e-4,3e-4")
        else:
            overrides.append(f"--sweep.{key}=[{values.strip('[]')}]")

    keys = [axis.partition("=")[0] for axis in axes]
    repeated = next((key for key in keys if keys.count(key) > 1), None)
    if repeated:
        raise BadInput(f"--sweep {repeated} is listed twice; write all values in one option: --sweep {repeated}=V1,V2")
    return overrides


def request_of(options: argparse.Namespace) -> RunRequest:
    """Build the request to start, resume or retry a run from the options of a command; what it lacks is the default."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(RunRequest):
        if hasattr(options, field.name):
            value = getattr(options, field.name)
            values[field.name] = tuple(value) if isinstance(value, list) else value
    values["overrides"] = (*options.overrides, *sweep_overrides(getattr(options, "sweep", [])))
    return RunRequest(**values)


def own_states(run_dir: RunDir, plan: Plan, states: Sequence[ElementState]) -> list[ElementState]:
    """Return the states without the elements that another run, which shares the shards, is making."""
    from amlaunch.launcher.runs.submissions import submissions_of

    jobs = {
        job
        for submissions in submissions_of(run_dir, plan).values()
        for submission in submissions
        if submission.run == str(run_dir.root)
        for job in submission.tasks().values()
    }
    return [
        state
        for state in states
        if (state.job in jobs if state.job else state.state != State.RUNNING or _started_element(run_dir, state))
    ]


def _started_element(run_dir: RunDir, state: ElementState) -> bool:
    """Return True if this run's launcher started an element: only then does the run have submitit's files of it."""
    from amlaunch.launcher.runs.attempt_record import AttemptHistory

    if run_dir.stage_home(state.stage) == run_dir.root:
        return True
    start = AttemptHistory.read(run_dir.element(state.stage, state.name).attempts).newest_start
    if start is None or not start.job:
        return False
    return any((run_dir.jobs / state.stage / state.name).glob(f"{start.job}_*"))


def raise_if_unknown(states: Sequence[ElementState], command: str, consequence: str) -> None:
    """Raise SlurmError if an element may be running, but nobody can tell."""
    from amlaunch.launcher.errors import SlurmError

    unknown = [state for state in states if state.state == State.UNKNOWN]
    if unknown:
        first = unknown[0]
        more = f" (and {len(unknown) - 1} more)" if unknown[1:] else ""
        raise SlurmError(command, f"{first.stage} {first.name}{more}: {first.reason}; {consequence}")
