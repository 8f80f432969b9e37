"""``amlaunch status``: all runs, or some with their stages and elements."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from launcher import describe
from launcher.plan import Plan
from launcher.queue import Queue
from launcher.state import (
    ACTIVE,
    CANCELLED,
    DIED,
    DONE,
    FAILED,
    PENDING,
    QUEUED,
    RUNNING,
    STOPPED,
    UNKNOWN,
    ElementState,
    is_driven,
    overall,
    read_runs,
)
from launcher.store import find_run, list_runs, read_plan, roots
from recipes.errors import BadInput
from recipes.files import read_object
from recipes.rundir import RunDir

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
Shown = tuple[RunDir, Plan, list[ElementState]]


def run(options: argparse.Namespace) -> int:
    """Print the state; with ``--watch`` again and again until nothing runs any more."""
    if options.watch and not options.json and sys.stdout.isatty():
        return _watch(options)
    while True:
        looked = time.monotonic()
        found, queue = _read(options)
        _print(found, queue, options)
        if not options.watch or not any(goes_on(run_dir, states) for run_dir, _, states in found):
            return 0
        time.sleep(_pause(found, time.monotonic() - looked))


def goes_on(run_dir: RunDir, states: Sequence[ElementState]) -> bool:
    """Whether to go on looking: what nobody can say may well be running."""
    return is_driven(run_dir, states) or any(state.state == UNKNOWN for state in states)


def _pause(found: Sequence[Shown], took: float) -> float:
    of_slurm = any(state.job and state.state in (*ACTIVE, UNKNOWN) for _, _, states in found for state in states)
    return rest(took, CLUSTER_WATCH_SECONDS if of_slurm else WATCH_SECONDS)


def rest(took: float, least: float) -> float:
    """How long to pause after a look that took so long."""
    return min(max(least, took / BUSY_PART), LONGEST_PAUSE)


def _read(options: argparse.Namespace) -> tuple[list[Shown], Queue]:
    places = roots(options.runs)
    runs = [find_run(places, name) for name in options.run] if options.run else list_runs(*places)
    pairs = []
    for run_dir in runs:
        try:
            pairs.append((run_dir, read_plan(run_dir)))
        except (BadInput, OSError) as error:
            if options.run:
                raise
            print(f"warning: {error}", file=sys.stderr)  # one damaged run does not hide the others
    queue = Queue()
    return [(run_dir, plan, states) for (run_dir, plan), states in zip(pairs, read_runs(pairs, queue), strict=True)], queue


def _print(found: list[Shown], queue: Queue, options: argparse.Namespace) -> None:
    if options.json:
        values = [describe.as_json(run_dir, plan, states, _word(run_dir, states)) for run_dir, plan, states in found]
        print(describe.to_json(values), flush=True)
        return
    if not found:
        print(f"no runs in {', '.join(map(str, roots(options.runs)))}; {describe.program()} local or submit starts one")
        return
    console = describe.console()
    for part in _view(found, queue, options):
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)


def _watch(options: argparse.Namespace) -> int:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=4) as live:
        while True:
            looked = time.monotonic()
            found, queue = _read(options)
            parts = [Text(part) if isinstance(part, str) else part for part in _view(found, queue, options)]
            live.update(Group(*parts))
            if not any(goes_on(run_dir, states) for run_dir, _, states in found):
                return 0
            time.sleep(_pause(found, time.monotonic() - looked))


def _view(found: list[Shown], queue: Queue, options: argparse.Namespace) -> list[Any]:
    warnings = [f"warning: {problem}; what follows is from the run directories alone" for problem in dict.fromkeys(queue.problems)]
    if not options.run:
        return [*warnings, _list_table(found), f"\n{describe.program()} status RUN shows one"]
    parts: list[Any] = list(warnings)
    for run_dir, plan, states in found:
        hours = sum(state.gpu_hours for state in states)
        used = f"  {hours:.2f} GPU-hours" if hours else ""
        where = f"  on {plan.cluster['name']}" if plan.cluster else ""
        parts += [f"{plan.run_id}  {_word(run_dir, states)}{where}{used}  {run_dir.root}", _element_table(states, options.all)]
        parts += [f"\n{text}" for text in advice(run_dir, plan, states, is_driven(run_dir, states))]
    return parts


def _word(run_dir: RunDir, states: list[ElementState]) -> str:
    return overall(states, is_driven(run_dir, states))


def _list_table(found: list[Shown]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("run", "state", "stage", "progress", "last start", box=None, padding=(0, 2, 0, 0))
    for run_dir, plan, states in found:
        now = current(states)
        word = _word(run_dir, states)
        ago = describe.duration(time.time() - run_dir.plan.stat().st_mtime) + " ago"
        words = describe.progress(now) if now.state == RUNNING else describe.outcome(now)
        table.add_row(plan.run_id, Text(word, style=describe.STYLES[word]), now.stage, words or describe.progress(now), ago)
    return table


def _element_table(states: list[ElementState], everything: bool) -> Any:
    from rich.table import Table
    from rich.text import Text

    on_cluster = any(state.job for state in states)
    columns = ["stage", "element", "state", *(["job", "node"] if on_cluster else []), "attempts", "time", "what"]
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for stage in dict.fromkeys(state.stage for state in states):
        mine = [state for state in states if state.stage == stage]
        shown = mine if everything or len(mine) <= MANY else notable(mine)
        if len(shown) < len(mine):
            counts = Counter(state.state for state in mine)
            words = ", ".join(f"{count} {word}" for word, count in counts.most_common())
            table.add_row(stage, f"{len(mine)}", words, *([""] * (len(columns) - 4)), "--all lists every one")
        for state in shown:
            what = describe.progress(state) if state.state == RUNNING else describe.outcome(state)
            what = f"{state.title}: {what}" if state.title and what else what or state.title
            place = [state.job, state.nodes or state.host] if on_cluster else []
            table.add_row(stage, state.name, Text(state.state, style=describe.STYLES[state.state]), *place, str(state.attempts or ""), describe.duration(state.seconds), what)
    return table


def notable(states: Sequence[ElementState]) -> list[ElementState]:
    """Of many elements, those to look at: in trouble first, then at work."""
    order = (FAILED, DIED, UNKNOWN, CANCELLED, RUNNING)
    return sorted((state for state in states if state.state in order), key=lambda state: order.index(state.state))[:MOST]


def current(states: list[ElementState]) -> ElementState:
    """The element to show for a whole run: the one in trouble or at work, else the newest that is not untouched."""
    for wanted in (FAILED, DIED, UNKNOWN, RUNNING, QUEUED, CANCELLED, STOPPED):
        for state in states:
            if state.state == wanted:
                return state
    train = [state for state in states if state.stage == "train" and state.state == DONE]
    return train[-1] if train else next((state for state in states if state.state != DONE), states[-1])


def advice(run_dir: RunDir, plan: Plan, states: list[ElementState], driven: bool = False) -> list[str]:
    """What failed and why, and what to type next."""
    again = again_command(run_dir, plan)
    word = overall(states, driven)
    blocks = [_failures(run_dir, alike, again) for alike in _alike(states)]
    if word in (STOPPED, CANCELLED) or (word == PENDING and plan.cluster):
        blocks.append(f"next: {again}\n(goes on from what is saved)")
    if driven:
        blocks.append(f"next: {describe.program()} logs {describe.name_of(run_dir)} -f")
    if word == UNKNOWN:
        blocks += _unknown(run_dir, states, again)
    return blocks


def _unknown(run_dir: RunDir, states: Sequence[ElementState], again: str) -> list[str]:
    """What to type where nobody can say how an element is."""
    lost = [state for state in states if is_lost(state)]
    if lost:
        return [f"{lost[0].stage} {lost[0].name}{f' and {len(lost) - 1} more' if lost[1:] else ''}: {lost[0].reason}\nnext: {again}\n(finds their job, or submits them again)"]
    return [f"next: {describe.program()} status {describe.name_of(run_dir)}, when Slurm answers again"]


def is_lost(state: ElementState) -> bool:
    """Whether a submit was interrupted before it knew the number of the job; only another submit finds out."""
    return state.state == UNKNOWN and not state.job


def _alike(states: list[ElementState]) -> list[list[ElementState]]:
    """Failed elements, those of a stage with the same reason together."""
    groups: dict[tuple[str, str], list[ElementState]] = {}
    for state in states:
        if state.state in (FAILED, DIED):
            groups.setdefault((state.stage, state.reason), []).append(state)
    return list(groups.values())


def _failures(run_dir: RunDir, alike: list[ElementState], again: str) -> str:
    lines = describe.failure(run_dir, alike[0], again)
    others = ", ".join(state.name for state in alike[1:9]) + (", …" if len(alike) > 9 else "")
    return "\n".join([lines[0], *([f"and so did {len(alike) - 1} more: {others}"] if others else []), *lines[1:]])


def again_command(run_dir: RunDir, plan: Plan) -> str:
    """What goes on with a run: on a cluster its failed elements alone, here the command that started it."""
    if plan.cluster:
        return f"{describe.program()} retry {describe.name_of(run_dir)}"
    made = read_object(run_dir.provenance)
    words = made.get("command")
    if not isinstance(words, list):
        words = ["amlaunch", "local", str(run_dir.recipe)]
    folder = str(made.get("cwd") or os.getcwd())
    there = "" if folder == os.getcwd() else f"cd {shlex.quote(folder)} && "
    return f"{there}{describe.program()} {shlex.join(map(str, words[1:]))}"
