"""Parts that several commands share: arguments, requests, states of a run, processes of the trainer."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from amlaunch.launcher.planning.run_request import RunRequest
from amlaunch.launcher.runs.states import State
from amlaunch.recipes.errors import BadInput

if TYPE_CHECKING:
    from amlaunch.launcher.runs.element_state import ElementState
    from amlaunch.launcher.specs.plan import Element, Plan
    from amlaunch.recipes.run_layout import RunDir

RUN_HELP = "ID of a run (or its beginning), name of its recipe, or run directory"
RECIPE_HELP = "a YAML file, or the name of a recipe that comes with amlaunch"


def accept_overrides(parser: argparse.ArgumentParser, synopsis: str) -> None:
    """Let a command take overrides of a recipe: ``--section.key VALUE``."""
    parser.set_defaults(overrides=[])
    parser.usage = f"{parser.prog} {synopsis} [options] [--section.key VALUE ...]"


def add_json_option(parser: argparse.ArgumentParser, text: str = "print JSON on stdout") -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help=text)


def add_runs_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--runs``, the folder of run directories."""
    parser.add_argument(
        "--runs",
        metavar="DIR",
        help="folder of the run directories (default: $AMLAUNCH_RUNS, the runs of the cluster profile, or ./runs)",
    )


def add_run_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names one run."""
    parser.add_argument("run", help=RUN_HELP)
    add_runs_option(parser)


def add_wait_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--wait``."""
    parser.add_argument(
        "--wait", action="store_true", help="wait until the run has ended; the exit code tells how it ended"
    )


def add_verbose_option(parser: argparse.ArgumentParser) -> None:
    """Add ``-v``."""
    parser.add_argument("-v", "--verbose", action="store_true", help="print all notes, not only the first")


def add_allow_target_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--allow-target``."""
    parser.add_argument(
        "--allow-target",
        action="append",
        default=[],
        metavar="NAME",
        help="also let _target_ use this package or module",
    )


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the commands that resolve a recipe: local, submit, show."""
    parser.add_argument("recipe", nargs="?", help=RECIPE_HELP)
    parser.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="GPUs per node to train on; 0 trains on the CPU (default: as in the recipe, if available)",
    )
    parser.add_argument("--stage", metavar="S", help="run only this stage")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="train once for each value (repeat --sweep with other keys for a grid)",
    )
    add_allow_target_option(parser)
    add_runs_option(parser)
    add_json_option(parser, "print the result as JSON on stdout")
    accept_overrides(parser, "[RECIPE]")


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose a checkpoint of a run."""
    add_run_argument(parser)
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


def build_request(options: argparse.Namespace) -> RunRequest:
    """Build the request to start, resume or retry a run from a command's options; others keep their default."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(RunRequest):
        if hasattr(options, field.name):
            value = getattr(options, field.name)
            values[field.name] = tuple(value) if isinstance(value, list) else value
    values["overrides"] = (*options.overrides, *sweep_overrides(getattr(options, "sweep", [])))
    return RunRequest(**values)


def own_states(run_dir: RunDir, plan: Plan, states: Sequence[ElementState]) -> list[ElementState]:
    """Return the states without the elements that another run with the same shards is processing."""
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
    """Return True if this run's launcher started an element: only then does the run have submitit files for it."""
    from amlaunch.launcher.runs.element_files import read_element_files

    if run_dir.stage_home(state.stage) == run_dir.root:
        return True
    start = read_element_files(run_dir.element(state.stage, state.name)).history.newest_start
    if start is None or not start.job:
        return False
    return any((run_dir.jobs / state.stage / state.name).glob(f"{start.job}_*"))


def raise_if_unknown(states: Sequence[ElementState], command: str, consequence: str) -> None:
    """Raise SlurmError if it is unknown whether an element is running."""
    from amlaunch.launcher.errors import SlurmError

    unknown = [state for state in states if state.state == State.UNKNOWN]
    if unknown:
        first = unknown[0]
        more = f" (and {len(unknown) - 1} more)" if unknown[1:] else ""
        raise SlurmError(command, f"{first.stage} {first.name}{more}: {first.reason}; {consequence}")


# --- processes of the trainer


def require_packages(*packages: str) -> None:
    """Raise BadInput if a package that training needs is not installed; login nodes often lack torch."""
    import importlib.util

    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise BadInput(
                f"{package} is not installed here; run pip install 'amlaunch[train]' (torch's CPU build is enough for "
                "work without GPUs), or run this command on a node that has it"
            )


def process_environment(*, gpus: int | None = None) -> dict[str, str]:
    """Return the environment of a process of the trainer.

    ``gpus``: 0 hides the GPUs from it, more requires that torch can use them, and None leaves the choice to it.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if gpus == 0:
        return {**environment, "AMLAUNCH_DEVICE": "cpu"}
    return {"AMLAUNCH_DEVICE": "cuda", **environment} if gpus else environment


def become_preprocess(arguments: Sequence[str]) -> NoReturn:
    """Replace this process with ``python -m amlaunch.preprocess``: the launcher never imports tokenizers."""
    from amlaunch.recipes.python_process import python_command

    command = [*python_command("amlaunch.preprocess"), *arguments]
    os.execve(command[0], command, process_environment())


def find_training(options: argparse.Namespace) -> tuple[RunDir, Plan, Element]:
    """Find the run and the train element that ``options`` choose. Raises BadInput."""
    from amlaunch.launcher.runs.find import find_run, read_plan, roots

    run_dir = find_run(roots(options.runs), options.run)
    plan = read_plan(run_dir)
    return run_dir, plan, _train_element(plan, options.element)


def run_on_checkpoint(module: str, options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run a module of the trainer on the checkpoint that ``options`` choose; return its exit code.

    It runs in the folder where relative paths in the run's recipe start. Raises BadInput.
    """
    import subprocess

    from amlaunch.recipes.python_process import python_command

    run_dir, plan, element = find_training(options)
    require_packages("torch", "safetensors")
    command = [*python_command(module), *_element_arguments(element), *_checkpoint_arguments(options), *arguments]
    folder = Path(plan.cwd) if Path(plan.cwd).is_dir() else run_dir.root
    return subprocess.run([*command, *options.overrides], cwd=folder).returncode


def _train_element(plan: Plan, name: str | None) -> Element:
    """Return the train element called ``name``, or the only one. Raises BadInput."""
    elements = plan.stage("train").elements
    matches = [element for element in elements if name in (None, element.name)]
    if len(matches) == 1:
        return matches[0]
    known = "; ".join(f"{element.name} ({element.title})" if element.title else element.name for element in elements)
    if name:
        raise BadInput(f"--element {name}: {plan.run_id} has no such train element; its elements: {known}")
    raise BadInput(f"{plan.run_id} trained several models; choose one with --element: {known}")


def _element_arguments(element: Element) -> list[str]:
    """Return an element's arguments without those that only training needs."""
    arguments = list(element.arguments)
    for option in ("--element", "--run-id"):
        if option in arguments:
            position = arguments.index(option)
            del arguments[position : position + 2]
    return arguments


def _checkpoint_arguments(options: argparse.Namespace) -> list[str]:
    if options.step is not None:
        return ["--step", str(options.step)]
    return ["--best"] if options.best else []
