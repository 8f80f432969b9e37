"""Progress of a run while a command waits for it: a live table in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from amlaunch.launcher.display import wording
from amlaunch.launcher.runs.element_state import ElementState
from amlaunch.launcher.runs.states import State

PLAIN_SECONDS = 5.0
"""Pause between two lines about the same running element."""
MAX_ROWS = 16
BAR_WIDTH = 16
SKIPPED = "already done, skipped"


class PlainReport:
    """Print a line when an element starts or ends, and one every ``seconds`` in between (None: none in between).

    ``done_note`` is printed for a stage that was done from the beginning.
    """

    def __init__(self, say: Callable[[str], None], seconds: float | None = PLAIN_SECONDS, done_note: str = SKIPPED):
        self.say = say
        self.seconds = seconds
        self.done_note = done_note
        self.last_state: dict[tuple[str, str], str] = {}
        self.last_time: dict[tuple[str, str], float] = {}
        self.last_line: dict[tuple[str, str], str] = {}

    def __enter__(self) -> PlainReport:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, states: Sequence[ElementState]) -> None:
        """Print what changed in one or several stages."""
        known_stages = {stage for stage, _ in self.last_state}
        for stage in dict.fromkeys(state.stage for state in states):
            stage_states = [state for state in states if state.stage == stage]
            is_new = stage not in known_stages
            if is_new and all(state.state == State.DONE for state in stage_states):
                self.say(f"{stage}: {self.done_note}")
            for state in stage_states:
                self._report_element(state, is_new)

    def _report_element(self, state: ElementState, is_new: bool) -> None:
        key = (state.stage, state.name)
        changed = self.last_state.get(key) != state.state
        self.last_state[key] = state.state
        if is_new and state.state != State.RUNNING:
            # The end of an earlier attempt is not news.
            return

        line = wording.status_line(state)
        is_due = self.seconds is not None and time.monotonic() - self.last_time.get(key, 0.0) > self.seconds
        has_progress = state.state == State.RUNNING and line != self.last_line.get(key)
        if changed or (is_due and has_progress):
            self.last_time[key] = time.monotonic()
            self.last_line[key] = line
            self.say(line)


class LiveReport:
    """Redraw a table of the active elements in place; lines about starts and ends stay above it."""

    def __init__(self, done_note: str = SKIPPED) -> None:
        from rich.live import Live

        self.console = wording.console()
        self.live = Live(console=self.console, refresh_per_second=4, transient=True)
        self.lines = PlainReport(self.say, seconds=None, done_note=done_note)

    def __enter__(self) -> LiveReport:
        self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)

    def say(self, text: str) -> None:
        """Print one line above the table."""
        self.console.print(text, markup=False)

    def __call__(self, states: Sequence[ElementState]) -> None:
        """Show the elements that run or wait."""
        self.lines(states)
        self.live.update(progress_table(states))


def progress_table(states: Sequence[ElementState]) -> Any:
    """Return a rich table with a bar for each running or waiting element, limited to one screen."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    for _ in range(3):
        table.add_column(no_wrap=True, overflow="ellipsis")

    active = [state for state in states if state.state in (State.RUNNING, State.QUEUED, State.PENDING)]
    active.sort(key=lambda state: state.state != State.RUNNING)
    for state in active[:MAX_ROWS]:
        done = state.progress.done if state.state == State.RUNNING else 0
        bar = ProgressBar(total=state.progress.total or 1, completed=done or 0, width=BAR_WIDTH)
        table.add_row(f"{state.stage} {state.name}", bar, _activity(state))
    if len(active) > MAX_ROWS:
        table.add_row("", "", f"and {len(active) - MAX_ROWS} more")
    return table


def _activity(state: ElementState) -> str:
    if state.state == State.RUNNING:
        return wording.progress(state) or "starting"
    return wording.waiting_text(state) or "waiting"


def make_report(json_output: bool, done_note: str = SKIPPED) -> PlainReport | LiveReport:
    """Return a live report in a terminal, else a plain one; on stderr if stdout is for JSON."""
    if not json_output and sys.stdout.isatty():
        return LiveReport(done_note)
    return PlainReport(_printer(sys.stderr if json_output else sys.stdout), done_note=done_note)


def _printer(stream: TextIO) -> Callable[[str], None]:
    return lambda text: print(text, file=stream, flush=True)
