"""How far an element is, for people and for ``progress.json``; and the request to stop soon."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from amlaunch.recipes.run_layout import ElementDir, Heartbeat

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOG_SECONDS = 5.0
LOOK_SECONDS = 1.0
DRAW_SECONDS = 0.2


class StopRequested(BaseException):
    """Leave now; what is whole stays, what is half goes. Not an Exception, so that no library swallows it."""


def stop_on_signals() -> None:
    """Turn SIGTERM, SIGINT and SIGUSR1 into StopRequested, at once: every write is atomic, so no moment is wrong."""

    def stop(number: int, _frame: Any) -> NoReturn:
        for (
            other
        ) in SIGNALS:  # the clean-up is not to be disturbed (SIG_IGN would have Python complain of one on its way)
            signal.signal(other, lambda *_: None)
        raise StopRequested(signal.Signals(number).name)

    for number in SIGNALS:
        signal.signal(number, stop)


class Progress:
    """A bar on a terminal, a line every few seconds elsewhere; beats once a second, and looks for the ``stop`` file."""

    def __init__(self, folder: ElementDir | None = None, say: Callable[[str], None] | None = None, bar: bool = False):
        self.folder = folder
        self._say = say or (lambda text: print(text, flush=True))
        self._heartbeat = Heartbeat(folder.progress if folder else None)
        self._started = self._looked = self._logged = self._drawn = time.monotonic()
        self._from = 0
        self._bar = Bar() if bar else None

    def say(self, text: str) -> None:
        """A line for people."""
        if self._bar:
            self._bar.say(text)
        else:
            self._say(text)

    def begin(self, done: int) -> None:
        """Count the rate from here: ``done`` tokens were there already."""
        self._from = done
        self._started = time.monotonic()

    def update(self, done: int, total: int | None, fraction: float | None = None, **more: Any) -> None:
        """Say that ``done`` of ``total`` tokens are there; cheap enough for every document. Raises StopRequested.

        ``fraction``: of all the work, where there is no total. ``more``: further counts, such as documents and workers;
        ``mb_per_s`` is megabytes of text a second.
        """
        now = time.monotonic()
        if self._bar and now - self._drawn >= DRAW_SECONDS:
            self._drawn = now
            self._bar.draw(
                _line(done, total, *self._rate(done, total, fraction), more), _fraction(done, total, fraction)
            )
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if self.folder is not None and self.folder.stop.exists():
            raise StopRequested("stop file")
        rate, eta = self._rate(done, total, fraction)
        self._heartbeat.beat(unit="token", done=done, total=total, rate=rate, eta_s=eta, **more)
        if not self._bar and now - self._logged >= LOG_SECONDS:
            self._logged = now
            self._say(_line(done, total, rate, eta, more))

    def finish(self, done: int, total: int | None, message: str, **more: Any) -> None:
        """The last word."""
        rate, _ = self._rate(done, total, None)
        self._heartbeat.beat(
            unit="token", done=done, total=total, rate=rate, eta_s=0.0, last=True, message=message, **more
        )
        self.close()
        self.say(message)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar:
            self._bar.close()
            self._bar = None

    def seconds(self) -> float:
        """Since the work began."""
        return time.monotonic() - self._started

    def _rate(self, done: int, total: int | None, fraction: float | None) -> tuple[float, float | None]:
        seconds = max(self.seconds(), 1e-9)
        rate = (done - self._from) / seconds
        if total is not None:
            return rate, (total - done) / rate if rate > 0 else None
        return rate, seconds * (1 - fraction) / fraction if fraction else None


def _fraction(done: int, total: int | None, fraction: float | None) -> float | None:
    return min(1.0, done / total) if total else fraction


def _line(done: int, total: int | None, rate: float, eta: float | None, more: dict[str, Any]) -> str:
    of = f" of {total:,}" if total is not None else ""
    left = f", {eta:,.0f} s left" if eta is not None else ""
    text = f", {more['mb_per_s']:.1f} MB/s" if "mb_per_s" in more else ""
    rest = "".join(f", {key} {value:,}" for key, value in more.items() if isinstance(value, int))
    return f"{done:,}{of} tokens{rest}, {rate:,.0f} tokens/s{text}{left}"


class Bar:
    """One live line at the foot of a terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(BarColumn(bar_width=24), TextColumn("{task.description}"), transient=True)
        self._task = self._progress.add_task("", total=None)
        self._progress.start()

    def draw(self, text: str, fraction: float | None) -> None:
        """Show how far it is; a bar that only moves where nobody knows."""
        self._progress.update(
            self._task, description=text, total=1.0 if fraction is not None else None, completed=fraction or 0.0
        )

    def say(self, text: str) -> None:
        """A line above it."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take it away."""
        self._progress.stop()


def on_a_terminal() -> bool:
    """Whether somebody looks at stdout live."""
    return sys.stdout.isatty()
