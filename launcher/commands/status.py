"""``amlaunch status``: list all runs, or show some with their stages and elements."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amlaunch.launcher.commands._shared import RUN_HELP, add_json_option, add_runs_option
from amlaunch.launcher.display import wording
from amlaunch.launcher.display.advice import advice, group_failures
from amlaunch.launcher.display.following import may_be_active, pause_seconds
from amlaunch.launcher.runs.element_state import ElementState, is_driven, overall_state, read_runs
from amlaunch.launcher.runs.find import find_run, list_runs, read_plan, roots
from amlaunch.launcher.runs.states import ACTIVE_STATES, BROKEN_STATES, State
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.run_layout import RunDir

if TYPE_CHECKING:
    from amlaunch.launcher.slurm.queue import Queue

WATCH_SECONDS = 2.0
CLUSTER_WATCH_SECONDS = 15.0
"""Slurm's controller serves everybody on the cluster."""
MAX_UNABRIDGED_ELEMENTS = 20
"""Elements of a stage that are all listed."""
MAX_LISTED_ELEMENTS = 10
"""Elements of a larger stage that are listed, those that need attention."""
MIN_LAST_COLUMN = 40
"""Width that the last column should have."""
DROPPABLE_COLUMNS = ("job", "time", "attempts", "last start", "stage", "node")
"""Columns that a narrow terminal omits, the first one first."""
PROMINENT_STATES = (
    State.FAILED,
    State.DIED,
    State.UNKNOWN,
    State.RUNNING,
    State.QUEUED,
    State.CANCELLED,
    State.STOPPED,
)
"""States that represent a whole run, in this order."""


@dataclass(frozen=True)
class RunStatus:
    """The states of a run's elements at one moment."""

    run_dir: RunDir
    plan: Plan
    states: list[ElementState]

    @property
    def state(self) -> str:
        """The state of the whole run."""
        return overall_state(self.states, self.is_driven)

    @property
    def is_driven(self) -> bool:
        """True if anything of the run is active."""
        return is_driven(self.run_dir, self.states)

    @property
    def may_be_active(self) -> bool:
        """True if anything of the run is active or unknown."""
        return may_be_active(self.run_dir, self.states)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch status``."""
    parser.add_argument("run", nargs="*", help=RUN_HELP)
    parser.add_argument("--watch", action="store_true", help="refresh until the run has ended (Ctrl-C stops watching)")
    parser.add_argument(
        "--all", action="store_true", help="list every element of a large stage, not only those that need attention"
    )
    add_runs_option(parser)
    add_json_option(parser)


def run(options: argparse.Namespace) -> int:
    """Print the state; with ``--watch`` repeat it until nothing is active."""
    if options.watch and not options.json and sys.stdout.isatty():
        return _watch(options)
    while True:
        started = time.monotonic()
        runs, problems = _read(options)
        _print(runs, problems, options)
        if not options.watch or not any(status.may_be_active for status in runs):
            return 0
        time.sleep(_pause(runs, time.monotonic() - started))


def _watch(options: argparse.Namespace) -> int:
    """Redraw the state in place until nothing is active."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=4) as live:
        while True:
            started = time.monotonic()
            runs, problems = _read(options)
            blocks = _blocks(runs, problems, options, live.console.width)
            live.update(Group(*(Text(block) if isinstance(block, str) else block for block in blocks)))
            if not any(status.may_be_active for status in runs):
                return 0
            time.sleep(_pause(runs, time.monotonic() - started))


def _pause(runs: Sequence[RunStatus], polling_seconds: float) -> float:
    """Return the seconds until the next poll; longer while Slurm has to be asked."""
    states = [state for status in runs for state in status.states]
    asks_slurm = any(state.job and state.state in (*ACTIVE_STATES, State.UNKNOWN) for state in states)
    return pause_seconds(polling_seconds, CLUSTER_WATCH_SECONDS if asks_slurm else WATCH_SECONDS)


# --- reading


def _read(options: argparse.Namespace) -> tuple[list[RunStatus], list[str]]:
    """Return the runs, and the errors of Slurm commands that did not answer."""
    folders = roots(options.runs)
    run_dirs = [find_run(folders, name) for name in options.run] if options.run else list_runs(*folders)
    runs = []
    for run_dir in run_dirs:
        try:
            runs.append((run_dir, _read_plan(run_dir)))
        except (BadInput, OSError) as error:
            if options.run:
                raise
            _warn(error)
    if not runs:
        return [], []

    from amlaunch.launcher.slurm.queue import Queue

    queue = Queue()
    try:
        states = read_runs(runs, queue)
    except OSError:
        if options.run:
            raise
        return list(_read_one_by_one(runs, queue)), queue.problems
    return [RunStatus(*run, of_run) for run, of_run in zip(runs, states, strict=True)], queue.problems


def _read_one_by_one(runs: Iterable[tuple[RunDir, Plan]], queue: Queue) -> Iterator[RunStatus]:
    """Yield the runs whose files can be read."""
    for run_dir, plan in runs:
        try:
            (states,) = read_runs([(run_dir, plan)], queue)
        except OSError as error:
            _warn(error)
        else:
            yield RunStatus(run_dir, plan, states)


def _warn(error: Exception) -> None:
    """Report a damaged or unreadable run; it does not hide the others."""
    text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    print(f"warning: {text}", file=sys.stderr)


def _read_plan(run_dir: RunDir) -> Plan:
    plan = read_plan(run_dir)
    if not any(stage.elements for stage in plan.stages):
        raise BadInput(f"{run_dir.plan}: the plan has no elements; delete the run or start it again")
    return plan


# --- printing


def _print(runs: list[RunStatus], problems: list[str], options: argparse.Namespace) -> None:
    if options.json:
        values = [wording.as_json(status.run_dir, status.plan, status.states, status.state) for status in runs]
        print(wording.to_json(values), flush=True)
        return
    if not runs:
        folders = ", ".join(map(str, roots(options.runs)))
        print(f"no runs in {folders}; start one with {wording.program()} local or submit")
        return
    console = wording.console()
    for block in _blocks(runs, problems, options, console.width):
        console.print(block, markup=False) if isinstance(block, str) else console.print(block)


def _blocks(runs: list[RunStatus], problems: list[str], options: argparse.Namespace, width: int) -> list[Any]:
    """Return the texts and tables to show."""
    warnings = [
        f"warning: {problem}; the states below come from the run directories alone"
        for problem in dict.fromkeys(problems)
    ]
    if not options.run:
        return [*warnings, _run_table(runs, width), f"\nfor details: {wording.program()} status RUN"]

    blocks: list[Any] = list(warnings)
    for status in runs:
        blocks.append(_run_line(status))
        blocks.append(_element_table(status.states, options.all, width))
        blocks += [f"\n{text}" for text in advice(status.run_dir, status.plan, status.states, status.is_driven)]
    return blocks


def _run_line(status: RunStatus) -> str:
    """Describe a run in one line: its ID, state, cluster, GPU-hours and directory."""
    gpu_hours = sum(state.gpu_hours for state in status.states)
    parts = [
        status.plan.run_id,
        status.state,
        f"on {status.plan.cluster['name']}" if status.plan.cluster else "",
        f"{gpu_hours:.2f} GPU-hours" if gpu_hours else "",
        str(status.run_dir.root),
    ]
    return "  ".join(part for part in parts if part)


def _run_table(runs: list[RunStatus], width: int) -> Any:
    """Return a table with a row for each run."""
    rows = []
    for status in runs:
        element = most_relevant(status.states)
        progress = wording.progress(element)
        outcome = wording.outcome(element)
        age = wording.duration(time.time() - status.run_dir.plan.stat().st_mtime)
        rows.append(
            {
                "run": status.plan.run_id,
                "state": status.state,
                "stage": element.stage,
                "last start": f"{age} ago",
                "progress": progress if element.state == State.RUNNING else outcome or progress,
            }
        )
    return _table(rows, width, DROPPABLE_COLUMNS, one_line=True)


def most_relevant(states: list[ElementState]) -> ElementState:
    """Return the element that represents a run: a broken one, else an active one, else the newest that did anything."""
    for prominent in PROMINENT_STATES:
        for state in states:
            if state.state == prominent:
                return state
    trained = [state for state in states if state.stage == "train" and state.state == State.DONE]
    if trained:
        return trained[-1]
    return next((state for state in states if state.state != State.DONE), states[-1])


def _element_table(states: list[ElementState], show_all: bool, width: int) -> Any:
    """Return a table with a row for each element; large stages are abridged unless ``show_all``."""
    rows = []
    for stage in dict.fromkeys(state.stage for state in states):
        elements = [state for state in states if state.stage == stage]
        is_abridged = not show_all and len(elements) > MAX_UNABRIDGED_ELEMENTS
        shown = needing_attention(elements) if is_abridged else elements
        if len(shown) < len(elements):
            rows.append(_stage_row(stage, elements))
        rows += [_element_row(state) for state in shown]
    if not any(state.attempts > 1 for state in states):
        rows = [{**row, "attempts": ""} for row in rows]
    return _table(rows, width, [name for name in DROPPABLE_COLUMNS if name not in ("stage", "node")])


def _element_row(state: ElementState) -> dict[str, str]:
    details = wording.progress(state) if state.state == State.RUNNING else wording.outcome(state)
    return {
        "stage": state.stage,
        "element": state.name,
        "state": str(state.state),
        "job": state.job,
        "node": state.nodes or (state.host if state.job else ""),
        "attempts": str(state.attempts or ""),
        "time": wording.duration(state.seconds),
        "what": ": ".join(part for part in (state.title, details) if part),
    }


def _stage_row(stage: str, states: Sequence[ElementState]) -> dict[str, str]:
    """Return a row that counts the elements of a large stage by state."""
    counts = Counter(state.state for state in states)
    text = ", ".join(f"{count} {state}" for state, count in counts.most_common())
    empty = dict.fromkeys(("state", "job", "node", "attempts", "time"), "")
    return {"stage": stage, "element": f"{len(states)}", **empty, "what": f"{text}; --all lists every element"}


def needing_attention(states: Sequence[ElementState]) -> list[ElementState]:
    """Return the elements of a large stage to look at: one of each kind of failure, then unknown and active ones."""
    order = (State.FAILED, State.DIED, State.UNKNOWN, State.CANCELLED, State.RUNNING)
    failures = [group[0] for group in group_failures(states)]
    others = [state for state in states if state.state in order and state.state not in (State.FAILED, State.DIED)]
    return sorted([*failures, *others], key=lambda state: order.index(state.state))[:MAX_LISTED_ELEMENTS]


def _table(rows: Sequence[dict[str, str]], width: int, droppable: Sequence[str], *, one_line: bool = False) -> Any:
    """Return a table of text; the last column takes the remaining width, and the others are never cut.

    Empty columns are omitted, and columns in ``droppable`` if the last column would be narrower than
    :data:`MIN_LAST_COLUMN`. ``one_line`` cuts the last column of every row; otherwise only that of failed elements,
    whose reason is printed in full below the table.
    """
    from rich.table import Table
    from rich.text import Text

    columns = fitting_columns(rows, width, droppable)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in columns[:-1]:
        table.add_column(name, no_wrap=True, min_width=max(len(name), *(len(row[name]) for row in rows)))
    table.add_column(columns[-1], overflow="fold")

    # Lines that are still too long are left to the terminal, which breaks them without cutting names.
    min_width = columns_width(rows, columns[:-1]) + MIN_LAST_COLUMN // 2
    table.width = min_width if min_width > width else None

    for row in rows:
        cells = [
            Text(row[name], style=wording.STYLES.get(row[name], "") if name == "state" else "") for name in columns
        ]
        if one_line or row["state"] in BROKEN_STATES:
            cells[-1].no_wrap, cells[-1].overflow = True, "ellipsis"
        table.add_row(*cells)
    return table


def fitting_columns(rows: Sequence[dict[str, str]], width: int, droppable: Sequence[str]) -> list[str]:
    """Return the columns that fit into ``width``; the last one is always among them."""
    *names, last = rows[0]
    used = [name for name in names if any(row[name] for row in rows)]
    for name in droppable:
        if width - columns_width(rows, used) >= MIN_LAST_COLUMN:
            break
        used = [column for column in used if column != name]
    return [*used, last]


def columns_width(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> int:
    """Return the width of some columns, with the gaps after them."""
    return sum(2 + max(len(name), *(len(row[name]) for row in rows)) for name in columns)
