"""``amlaunch status``: all runs, or some with their stages and elements."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from amlaunch.launcher.commands._shared import RUN_HELP, add_json, add_runs
from amlaunch.launcher.display import wording
from amlaunch.launcher.runs.element_state import ElementState, is_driven, overall, read_runs
from amlaunch.launcher.runs.find import find_run, list_runs, read_plan, roots
from amlaunch.launcher.runs.states import ACTIVE_STATES, State
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import read_object
from amlaunch.recipes.run_layout import RunDir

if TYPE_CHECKING:
    from amlaunch.launcher.slurm.queue import Queue

WATCH_SECONDS = 2.0
CLUSTER_WATCH_SECONDS = 15.0
"""Slurm's controller answers everybody on the cluster."""
BUSY_PART = 0.1
"""Who follows a run spends at most so much of the time looking, however many elements there are…"""
LONGEST_PAUSE = 60.0
"""…but looks at least this often, however long Slurm takes to say nothing."""
MANY = 20
"""Elements of a stage that are still listed one by one."""
MOST = 10
"""Of the elements of a larger stage that want attention, so many are listed."""
MOST_KINDS = 5
"""So many kinds of failure are told in full."""
NARROW = 40
"""Columns that what happened to an element wants at least."""
SPARE = ("job", "time", "attempts", "last start", "stage", "node")
"""Columns that a narrow terminal goes without, the first one first; of one run the stage and the node stay."""
Shown = tuple[RunDir, Plan, list[ElementState]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch status``."""
    parser.add_argument("run", nargs="*", help=RUN_HELP)
    parser.add_argument("--watch", action="store_true", help="refresh until the run has ended (Ctrl-C stops watching)")
    parser.add_argument(
        "--all", action="store_true", help="list every element of a large stage, not only those that need attention"
    )
    add_runs(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the state; with ``--watch`` again and again until nothing runs any more."""
    if options.watch and not options.json and sys.stdout.isatty():
        return _watch(options)
    while True:
        looked = time.monotonic()
        found, problems = _read(options)
        _print(found, problems, options)
        if not options.watch or not any(goes_on(run_dir, states) for run_dir, _, states in found):
            return 0
        time.sleep(_pause(found, time.monotonic() - looked))


def goes_on(run_dir: RunDir, states: Sequence[ElementState]) -> bool:
    """Whether to go on looking: what nobody can say may well be running."""
    return is_driven(run_dir, states) or any(state.state == State.UNKNOWN for state in states)


def _pause(found: Sequence[Shown], took: float) -> float:
    of_slurm = any(
        state.job and state.state in (*ACTIVE_STATES, State.UNKNOWN) for _, _, states in found for state in states
    )
    return rest(took, CLUSTER_WATCH_SECONDS if of_slurm else WATCH_SECONDS)


def rest(took: float, least: float) -> float:
    """How long to pause after a look that took so long."""
    return min(max(least, took / BUSY_PART), LONGEST_PAUSE)


def _read(options: argparse.Namespace) -> tuple[list[Shown], list[str]]:
    """The runs, and what did not answer."""
    places = roots(options.runs)
    runs = [find_run(places, name) for name in options.run] if options.run else list_runs(*places)
    pairs = []
    for run_dir in runs:
        try:
            pairs.append((run_dir, _plan_of(run_dir)))
        except (BadInput, OSError) as error:
            if options.run:
                raise
            _warn(error)
    if not pairs:
        return [], []
    from amlaunch.launcher.slurm.queue import Queue

    queue = Queue()
    try:
        found = [(*pair, states) for pair, states in zip(pairs, read_runs(pairs, queue), strict=True)]
    except OSError:
        if options.run:
            raise
        found = list(_one_by_one(pairs, queue))
    return found, queue.problems


def _one_by_one(pairs: Iterable[tuple[RunDir, Plan]], queue: Queue) -> Iterator[Shown]:
    """The runs whose files can be read."""
    for pair in pairs:
        try:
            yield (*pair, read_runs([pair], queue)[0])
        except OSError as error:
            _warn(error)


def _warn(error: Exception) -> None:
    """One damaged or closed run does not hide the others."""
    words = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
    print(f"warning: {words}", file=sys.stderr)


def _plan_of(run_dir: RunDir) -> Plan:
    plan = read_plan(run_dir)
    if not any(stage.elements for stage in plan.stages):
        raise BadInput(f"{run_dir.plan}: a plan without any element")
    return plan


def _print(found: list[Shown], problems: list[str], options: argparse.Namespace) -> None:
    if options.json:
        values = [wording.as_json(run_dir, plan, states, _word(run_dir, states)) for run_dir, plan, states in found]
        print(wording.to_json(values), flush=True)
        return
    if not found:
        print(f"no runs in {', '.join(map(str, roots(options.runs)))}; {wording.program()} local or submit starts one")
        return
    console = wording.console()
    for part in _view(found, problems, options, console.width):
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)


def _watch(options: argparse.Namespace) -> int:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=4) as live:
        while True:
            looked = time.monotonic()
            found, problems = _read(options)
            parts = [
                Text(part) if isinstance(part, str) else part
                for part in _view(found, problems, options, live.console.width)
            ]
            live.update(Group(*parts))
            if not any(goes_on(run_dir, states) for run_dir, _, states in found):
                return 0
            time.sleep(_pause(found, time.monotonic() - looked))


def _view(found: list[Shown], problems: list[str], options: argparse.Namespace, width: int) -> list[Any]:
    warnings = [
        f"warning: {problem}; what follows is from the run directories alone" for problem in dict.fromkeys(problems)
    ]
    if not options.run:
        return [*warnings, _list_table(found, width), f"\n{wording.program()} status RUN shows one"]
    parts: list[Any] = list(warnings)
    for run_dir, plan, states in found:
        hours = sum(state.gpu_hours for state in states)
        used = f"  {hours:.2f} GPU-hours" if hours else ""
        where = f"  on {plan.cluster['name']}" if plan.cluster else ""
        parts += [
            f"{plan.run_id}  {_word(run_dir, states)}{where}{used}  {run_dir.root}",
            _element_table(states, options.all, width),
        ]
        parts += [f"\n{text}" for text in advice(run_dir, plan, states, is_driven(run_dir, states))]
    return parts


def _word(run_dir: RunDir, states: list[ElementState]) -> str:
    return overall(states, is_driven(run_dir, states))


def _list_table(found: list[Shown], width: int) -> Any:
    rows = []
    for run_dir, plan, states in found:
        now = current(states)
        words = wording.progress(now) if now.state == State.RUNNING else wording.outcome(now)
        rows.append(
            {
                "run": plan.run_id,
                "state": _word(run_dir, states),
                "stage": now.stage,
                "last start": wording.duration(time.time() - run_dir.plan.stat().st_mtime) + " ago",
                "progress": words or wording.progress(now),
            }
        )
    return _table(rows, width, SPARE, short=True)


def _table(rows: Sequence[dict[str, str]], width: int, spare: Sequence[str], *, short: bool = False) -> Any:
    """Rows of text; the last column takes what room there is, the others are never cut.

    Columns that say nothing are left out; where the last one has less than
    :data:`NARROW`, those of ``spare`` too. ``short``: a line each; else only of
    what went wrong, which is told in full below.
    """
    from rich.table import Table
    from rich.text import Text

    columns = fitting(rows, width, spare)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in columns[:-1]:
        table.add_column(name, no_wrap=True, min_width=max(len(name), *(len(row[name]) for row in rows)))
    table.add_column(columns[-1], overflow="fold")
    least = room(rows, columns[:-1]) + NARROW // 2
    table.width = least if least > width else None  # the terminal itself breaks such lines
    for row in rows:
        cells = [
            Text(row[name], style=wording.STYLES.get(row[name], "") if name == "state" else "") for name in columns
        ]
        if short or row["state"] in (State.FAILED, State.DIED, State.UNKNOWN):
            cells[-1].no_wrap, cells[-1].overflow = True, "ellipsis"
        table.add_row(*cells)
    return table


def fitting(rows: Sequence[dict[str, str]], width: int, spare: Sequence[str]) -> list[str]:
    """The columns to show in ``width``; the last one always."""
    *names, last = rows[0]
    used = [name for name in names if any(row[name] for row in rows)]
    for name in spare:
        if width - room(rows, used) >= NARROW:
            break
        used = [one for one in used if one != name]
    return [*used, last]


def room(rows: Sequence[dict[str, str]], columns: Sequence[str]) -> int:
    """How wide some columns are, with the gaps after them."""
    return sum(2 + max(len(name), *(len(row[name]) for row in rows)) for name in columns)


def _element_table(states: list[ElementState], everything: bool, width: int) -> Any:
    rows = []
    for stage in dict.fromkeys(state.stage for state in states):
        mine = [state for state in states if state.stage == stage]
        shown = mine if everything or len(mine) <= MANY else notable(mine)
        if len(shown) < len(mine):
            rows.append(_counted(stage, mine))
        rows += [_element_row(state) for state in shown]
    if not any(state.attempts > 1 for state in states):
        rows = [{**row, "attempts": ""} for row in rows]
    return _table(rows, width, [name for name in SPARE if name not in ("stage", "node")])


def _element_row(state: ElementState) -> dict[str, str]:
    what = wording.progress(state) if state.state == State.RUNNING else wording.outcome(state)
    what = f"{state.title}: {what}" if state.title and what else what or state.title
    place = {"job": state.job, "node": state.nodes or (state.host if state.job else "")}
    attempts, took = str(state.attempts or ""), wording.duration(state.seconds)
    return {
        "stage": state.stage,
        "element": state.name,
        "state": state.state,
        **place,
        "attempts": attempts,
        "time": took,
        "what": what,
    }


def _counted(stage: str, states: Sequence[ElementState]) -> dict[str, str]:
    """A row for all elements of a large stage."""
    counts = Counter(state.state for state in states)
    words = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    empty = dict.fromkeys(("job", "node", "attempts", "time"), "")
    return {
        "stage": stage,
        "element": f"{len(states)}",
        "state": "",
        **empty,
        "what": f"{words}; --all lists every one",
    }


def notable(states: Sequence[ElementState]) -> list[ElementState]:
    """Of many elements, those to look at: in trouble first (of those that failed alike one), then at work."""
    order = (State.FAILED, State.DIED, State.UNKNOWN, State.CANCELLED, State.RUNNING)
    trouble = [group[0] for group in alike(states)]
    others = [state for state in states if state.state in order and state.state not in (State.FAILED, State.DIED)]
    return sorted([*trouble, *others], key=lambda state: order.index(state.state))[:MOST]


def current(states: list[ElementState]) -> ElementState:
    """The element to show for a whole run: the one in trouble or at work, else the newest that is not untouched."""
    for wanted in (
        State.FAILED,
        State.DIED,
        State.UNKNOWN,
        State.RUNNING,
        State.QUEUED,
        State.CANCELLED,
        State.STOPPED,
    ):
        for state in states:
            if state.state == wanted:
                return state
    train = [state for state in states if state.stage == "train" and state.state == State.DONE]
    return train[-1] if train else next((state for state in states if state.state != State.DONE), states[-1])


def advice(run_dir: RunDir, plan: Plan, states: list[ElementState], driven: bool = False) -> list[str]:
    """What failed and why, and what to type next."""
    again = again_command(run_dir, plan)
    word = overall(states, driven)
    groups = alike(states)
    blocks = [_failures(run_dir, group, again) for group in groups[:MOST_KINDS]]
    if groups[MOST_KINDS:]:
        others = sum(len(group) for group in groups[MOST_KINDS:])
        blocks.append(
            f"{others} more failed otherwise; {wording.program()} status {wording.name_of(run_dir)} --all lists them, {wording.program()} logs {wording.name_of(run_dir)} shows theirs"
        )
    if word in (State.STOPPED, State.CANCELLED) or (word == State.PENDING and plan.cluster):
        blocks.append(f"next: {again}\n(goes on from what is saved)")
    if driven:
        blocks.append(f"next: {wording.program()} logs {wording.name_of(run_dir)} -f")
    if word == State.UNKNOWN:
        blocks += _unknown(run_dir, states, again)
    return blocks


def _unknown(run_dir: RunDir, states: Sequence[ElementState], again: str) -> list[str]:
    """What to type where nobody can say how an element is."""
    lost = [state for state in states if is_lost(state)]
    if lost:
        return [
            f"{lost[0].stage} {lost[0].name}{f' and {len(lost) - 1} more' if lost[1:] else ''}: {lost[0].reason}\nnext: {again}\n(finds their job, or submits them again)"
        ]
    return [f"next: {wording.program()} status {wording.name_of(run_dir)}, when Slurm answers again"]


def is_lost(state: ElementState) -> bool:
    """Whether a submit was interrupted before it knew the number of the job; only another submit finds out."""
    return state.state == State.UNKNOWN and not state.job


def alike(states: Iterable[ElementState]) -> list[list[ElementState]]:
    """Failed elements, those of a stage whose reasons say the same together."""
    groups: dict[tuple[str, str], list[ElementState]] = {}
    for state in states:
        if state.state in (State.FAILED, State.DIED):
            groups.setdefault((state.stage, essence(state)), []).append(state)
    return list(groups.values())


VARIES = re.compile(r"(?<!code )(?<!SIG)(?:0x)?[0-9a-fA-F]*\d[0-9a-fA-F]*(?:[.:_-]\d+)*")
"""Numbers of jobs, processes, ports, addresses, times; not an exit code, which says what went wrong."""


def essence(state: ElementState) -> str:
    """A reason without what differs from one element to the next: numbers, and the name of the host."""
    words = state.reason
    for host in filter(None, (state.host, state.nodes)):
        words = words.replace(host, "HOST")
    return VARIES.sub("N", words)


def _failures(run_dir: RunDir, group: list[ElementState], again: str) -> str:
    lines = wording.failure_report(run_dir, group[0], again)
    return "\n".join([lines[0], *_and_others(group), *lines[1:]])


def _and_others(group: list[ElementState]) -> list[str]:
    """Which other elements failed alike, and whether it was on one host."""
    if not group[1:]:
        return []
    names = ", ".join(state.name for state in group[1:9]) + (", …" if group[9:] else "")
    same = "" if len({state.reason for state in group}) == 1 else ", with other numbers"
    hosts = {state.host or state.nodes for state in group}
    where = f", on {len(hosts)} hosts" if hosts - {""} and len(hosts) > 1 else ""
    return [f"and so did {len(group) - 1} more{same}{where}: {names}"]


def again_command(run_dir: RunDir, plan: Plan) -> str:
    """What goes on with a run: on a cluster its failed elements alone, here the command that started it."""
    if plan.cluster:
        return f"{wording.program()} retry {wording.name_of(run_dir)}"
    made = read_object(run_dir.provenance)
    words = made.get("command")
    if not isinstance(words, list):
        words = ["amlaunch", "local", str(run_dir.recipe)]
    folder = str(made.get("cwd") or os.getcwd())
    there = "" if folder == os.getcwd() else f"cd {shlex.quote(folder)} && "
    return f"{there}{wording.program()} {shlex.join(map(str, words[1:]))}"
