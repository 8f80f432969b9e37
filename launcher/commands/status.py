"""``amlaunch status``: all runs, or some with their stages and elements."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from typing import Any

from launcher import describe
from launcher.plan import Plan
from launcher.state import DIED, DONE, FAILED, RUNNING, STOPPED, ElementState, is_driven, overall, read_run
from launcher.store import find_run, list_runs, read_plan, runs_root
from recipes.errors import BadInput
from recipes.files import read_object
from recipes.rundir import RunDir

WATCH_SECONDS = 2.0
Shown = tuple[RunDir, Plan, list[ElementState]]


def run(options: argparse.Namespace) -> int:
    """Print the state; with ``--watch`` again and again until nothing runs any more."""
    if options.watch and not options.json and sys.stdout.isatty():
        return _watch(options)
    while True:
        found = _read(options)
        _print(found, options)
        if not options.watch or not any(is_driven(run_dir, states) for run_dir, _, states in found):
            return 0
        time.sleep(WATCH_SECONDS)


def _read(options: argparse.Namespace) -> list[Shown]:
    root = runs_root(options.runs)
    runs = [find_run(root, name) for name in options.run] if options.run else list_runs(root)
    found = []
    for run_dir in runs:
        try:
            plan = read_plan(run_dir)
            states = read_run(run_dir, plan)
        except (BadInput, OSError) as error:
            if options.run:
                raise
            print(f"warning: {error}", file=sys.stderr)  # one damaged run does not hide the others
            continue
        found.append((run_dir, plan, states))
    return found


def _print(found: list[Shown], options: argparse.Namespace) -> None:
    if options.json:
        values = [describe.as_json(run_dir, plan, states, _word(run_dir, states)) for run_dir, plan, states in found]
        print(describe.to_json(values), flush=True)
        return
    if not found:
        print(f"no runs in {runs_root(options.runs)}; {describe.program()} local starts one")
        return
    console = describe.console()
    for part in _view(found, bool(options.run)):
        console.print(part, markup=False) if isinstance(part, str) else console.print(part)


def _watch(options: argparse.Namespace) -> int:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=4) as live:
        while True:
            found = _read(options)
            parts = [Text(part) if isinstance(part, str) else part for part in _view(found, bool(options.run))]
            live.update(Group(*parts))
            if not any(is_driven(run_dir, states) for run_dir, _, states in found):
                return 0
            time.sleep(WATCH_SECONDS)


def _view(found: list[Shown], details: bool) -> list[Any]:
    if not details:
        return [_list_table(found), f"\n{describe.program()} status RUN shows one"]
    parts: list[Any] = []
    for run_dir, plan, states in found:
        parts += [f"{plan.run_id}  {_word(run_dir, states)}  {run_dir.root}", _element_table(states)]
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
        table.add_row(plan.run_id, Text(word, style=describe.STYLES[word]), now.stage, describe.outcome(now) if now.state == DONE else describe.progress(now) or describe.outcome(now), ago)
    return table


def _element_table(states: list[ElementState]) -> Any:
    from rich.table import Table
    from rich.text import Text

    table = Table("stage", "element", "state", "attempts", "time", "what", box=None, padding=(0, 2, 0, 0))
    for state in states:
        what = describe.progress(state) if state.state == RUNNING else describe.outcome(state)
        if state.title:
            what = f"{state.title}: {what}" if what else state.title
        table.add_row(state.stage, state.name, Text(state.state, style=describe.STYLES[state.state]), str(state.attempts or ""), describe.duration(state.seconds), what)
    return table


def current(states: list[ElementState]) -> ElementState:
    """The element to show for a whole run: the one in trouble or at work, else the newest that is not untouched."""
    for wanted in (FAILED, DIED, RUNNING, STOPPED):
        for state in states:
            if state.state == wanted:
                return state
    train = [state for state in states if state.stage == "train" and state.state == DONE]
    return train[-1] if train else next((state for state in states if state.state != DONE), states[-1])


def advice(run_dir: RunDir, plan: Plan, states: list[ElementState], driven: bool = False) -> list[str]:
    """What failed and why, and what to type next."""
    again = again_command(run_dir)
    word = overall(states, driven)
    blocks = [_failures(run_dir, alike, again) for alike in _alike(states)]
    if word == STOPPED:
        blocks.append(f"next: {again}\n(goes on from what is saved)")
    if word == RUNNING:
        blocks.append(f"next: {describe.program()} logs {describe.name_of(run_dir)} -f")
    return blocks


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


def again_command(run_dir: RunDir) -> str:
    """The command that started the run, which is also the one that goes on."""
    made = read_object(run_dir.provenance)
    words = made.get("command")
    if not isinstance(words, list):
        words = ["amlaunch", "local", str(run_dir.recipe)]
    folder = str(made.get("cwd") or os.getcwd())
    there = "" if folder == os.getcwd() else f"cd {shlex.quote(folder)} && "
    return f"{there}{describe.program()} {shlex.join(map(str, words[1:]))}"
