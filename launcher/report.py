"""What ``amlaunch local`` shows while it runs: a live table in a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from launcher import describe
from launcher.plan import Stage
from launcher.state import DONE, PENDING, RUNNING, ElementState

PLAIN_SECONDS = 5.0


class PlainReport:
    """A line when an element starts or ends, and one every ``seconds`` in between (never: None)."""

    def __init__(self, say: Callable[[str], None], seconds: float | None = PLAIN_SECONDS):
        self.say = say
        self.seconds = seconds
        self.before: dict[tuple[str, str], str] = {}
        self.spoke: dict[tuple[str, str], float] = {}
        self.said: dict[tuple[str, str], str] = {}

    def __enter__(self) -> PlainReport:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, stage: Stage, states: list[ElementState]) -> None:
        """Show the elements of the stage that is being carried out."""
        new = not any(key[0] == stage.name for key in self.before)
        if new and all(state.state == DONE for state in states):
            self.say(f"{stage.name}: already done, skipped")
        for state in states:
            self._element(state, new)

    def _element(self, state: ElementState, new: bool) -> None:
        key = (state.stage, state.name)
        changed = self.before.get(key) != state.state
        self.before[key] = state.state
        if new and state.state != RUNNING:
            return  # how an earlier start ended is not news
        overdue = self.seconds is not None and time.monotonic() - self.spoke.get(key, 0.0) > self.seconds
        words = describe.line(state)
        if changed or (overdue and state.state == RUNNING and words != self.said.get(key)):
            self.spoke[key] = time.monotonic()
            self.said[key] = words
            self.say(words)


class LiveReport:
    """A table of the elements that run, redrawn in place; starts and ends stay above it as lines."""

    def __init__(self) -> None:
        from rich.live import Live

        self.console = describe.console()
        self.live = Live(console=self.console, refresh_per_second=4, transient=True)
        self.lines = PlainReport(self.say, seconds=None)

    def __enter__(self) -> LiveReport:
        self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)

    def say(self, text: str) -> None:
        """One line above the table."""
        self.console.print(text, markup=False)

    def __call__(self, stage: Stage, states: list[ElementState]) -> None:
        """Show the elements of the stage that is being carried out."""
        self.lines(stage, states)
        self.live.update(progress_table(states))


def progress_table(states: list[ElementState]) -> Any:
    """A row with a bar for each element that runs or waits."""
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    for _ in range(3):
        table.add_column(no_wrap=True, overflow="ellipsis")
    for state in states:
        if state.state in (RUNNING, PENDING):
            beat = state.progress if state.state == RUNNING else {}
            bar = ProgressBar(total=beat.get("total") or 1, completed=beat.get("done") or 0, width=16)
            words = describe.progress(state) if beat else ("starting" if state.state == RUNNING else "waiting")
            table.add_row(f"{state.stage} {state.name}", bar, words)
    return table


def make_report(json_output: bool) -> PlainReport | LiveReport:
    """Live in a terminal; plain otherwise; on stderr when stdout is for JSON."""
    if not json_output and sys.stdout.isatty():
        return LiveReport()
    return PlainReport(_printer(sys.stderr if json_output else sys.stdout))


def _printer(stream: TextIO) -> Callable[[str], None]:
    return lambda text: print(text, file=stream, flush=True)
