"""What ``amlaunch local`` shows while it runs: a live table in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from amlaunch.launcher.display import wording
from amlaunch.launcher.runs.element_state import ElementState
from amlaunch.launcher.runs.states import State

PLAIN_SECONDS = 5.0
MOST_ROWS = 16
SKIPPED = "already done, skipped"


class PlainReport:
    """A line when an element starts or ends, and one every ``seconds`` in between (never: None)."""

    def __init__(self, say: Callable[[str], None], seconds: float | None = PLAIN_SECONDS, done_before: str = SKIPPED):
        self.say = say
        self.seconds = seconds
        self.done_before = done_before
        self.before: dict[tuple[str, str], str] = {}
        self.spoke: dict[tuple[str, str], float] = {}
        self.said: dict[tuple[str, str], str] = {}

    def __enter__(self) -> PlainReport:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, states: Sequence[ElementState]) -> None:
        """Show what has changed in one or several stages."""
        known = {stage for stage, _ in self.before}
        for stage in dict.fromkeys(state.stage for state in states):
            mine = [state for state in states if state.stage == stage]
            if stage not in known and all(state.state == State.DONE for state in mine):
                self.say(f"{stage}: {self.done_before}")
            for state in mine:
                self._element(state, stage not in known)

    def _element(self, state: ElementState, new: bool) -> None:
        key = (state.stage, state.name)
        changed = self.before.get(key) != state.state
        self.before[key] = state.state
        if new and state.state != State.RUNNING:
            return  # how an earlier start ended is not news
        overdue = self.seconds is not None and time.monotonic() - self.spoke.get(key, 0.0) > self.seconds
        words = wording.line(state)
        if changed or (overdue and state.state == State.RUNNING and words != self.said.get(key)):
            self.spoke[key] = time.monotonic()
            self.said[key] = words
            self.say(words)


class LiveReport:
    """A table of the elements that run, redrawn in place; starts and ends stay above it as lines."""

    def __init__(self, done_before: str = SKIPPED) -> None:
        from rich.live import Live

        self.console = wording.console()
        self.live = Live(console=self.console, refresh_per_second=4, transient=True)
        self.lines = PlainReport(self.say, seconds=None, done_before=done_before)

    def __enter__(self) -> LiveReport:
        self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)

    def say(self, text: str) -> None:
        """One line above the table."""
        self.console.print(text, markup=False)

    def __call__(self, states: Sequence[ElementState]) -> None:
        """Show the elements that run or wait."""
        self.lines(states)
        self.live.update(progress_table(states))


def progress_table(states: Sequence[ElementState]) -> Any:
    """A row with a bar for each element that runs or waits; of very many, as many as fit a screen."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    for _ in range(3):
        table.add_column(no_wrap=True, overflow="ellipsis")
    shown = sorted(
        (state for state in states if state.state in (State.RUNNING, State.QUEUED, State.PENDING)),
        key=lambda state: state.state != State.RUNNING,
    )
    for state in shown[:MOST_ROWS]:
        beat = state.progress if state.state == State.RUNNING else {}
        bar = ProgressBar(total=beat.get("total") or 1, completed=beat.get("done") or 0, width=16)
        words = (
            wording.progress(state)
            if beat
            else ("starting" if state.state == State.RUNNING else wording.waiting(state) or "waiting")
        )
        table.add_row(f"{state.stage} {state.name}", bar, words)
    if len(shown) > MOST_ROWS:
        table.add_row("", "", f"and {len(shown) - MOST_ROWS} more")
    return table


def make_report(json_output: bool, done_before: str = SKIPPED) -> PlainReport | LiveReport:
    """Live in a terminal; plain otherwise; on stderr when stdout is for JSON."""
    if not json_output and sys.stdout.isatty():
        return LiveReport(done_before)
    return PlainReport(_printer(sys.stderr if json_output else sys.stdout), done_before=done_before)


def _printer(stream: TextIO) -> Callable[[str], None]:
    return lambda text: print(text, file=stream, flush=True)
