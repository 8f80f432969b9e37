"""Progress of an element, for people and for ``progress.json``; and requests to stop."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

from amlaunch.recipes.run_layout import ElementDir, Heartbeat

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOG_SECONDS = 5.0
"""Between two log lines."""
HEARTBEAT_SECONDS = 1.0
"""Between two heartbeats, and two checks for the ``stop`` file."""
REDRAW_SECONDS = 0.2
"""Between two updates of the bar."""


class StopRequested(BaseException):
    """Stop now: finished files stay, partial files are removed. Not an Exception, so that no library swallows it."""


def stop_on_signals() -> None:
    """Raise StopRequested on SIGTERM, SIGINT or SIGUSR1, at once: every write is atomic, so any moment is safe."""

    def stop(number: int, _frame: Any) -> NoReturn:
        # A second signal must not interrupt the clean-up. A handler that does nothing, not SIG_IGN: Python complains
        # about a signal that was already pending when its handler became SIG_IGN.
        for stop_signal in STOP_SIGNALS:
            signal.signal(stop_signal, lambda *_: None)
        raise StopRequested(signal.Signals(number).name)

    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, stop)


class Progress:
    """A progress report: a bar on a terminal, else a log line every few seconds; and a heartbeat every second."""

    def __init__(self, folder: ElementDir | None = None, log: Callable[[str], None] | None = None, bar: bool = False):
        self.folder = folder
        self._log = log or (lambda text: print(text, flush=True))
        self._heartbeat = Heartbeat(folder.progress if folder else None)
        self._bar = ProgressBar() if bar else None
        self._done_at_start = 0

        now = time.monotonic()
        self._started = self._last_heartbeat = self._last_log = self._last_redraw = now

    def log(self, text: str) -> None:
        """Print a line for people, above the bar if there is one."""
        if self._bar:
            self._bar.print_above(text)
        else:
            self._log(text)

    def begin(self, done: int) -> None:
        """Measure the rate from now on; ``done`` tokens existed before."""
        self._done_at_start = done
        self._started = time.monotonic()

    def update(self, done: int, total: int | None, fraction: float | None = None, **counts: Any) -> None:
        """Report that ``done`` of ``total`` tokens are written; cheap enough to call for every document.

        ``fraction``: share of the work that is done, for when the total is unknown. ``counts``: further fields of
        ``progress.json``, such as documents and workers; ``mb_per_s`` is megabytes of text a second. Raises
        StopRequested if the ``stop`` file exists.
        """
        now = time.monotonic()
        if self._bar and now - self._last_redraw >= REDRAW_SECONDS:
            self._last_redraw = now
            text = _status_line(done, total, *self._rate_and_eta(done, total, fraction), counts)
            self._bar.draw(text, min(1.0, done / total) if total else fraction)

        if now - self._last_heartbeat < HEARTBEAT_SECONDS:
            return
        self._last_heartbeat = now
        if self.folder is not None and self.folder.stop.exists():
            raise StopRequested("stop file")

        rate, eta = self._rate_and_eta(done, total, fraction)
        self._heartbeat.beat(unit="token", done=done, total=total, rate=rate, eta_s=eta, **counts)
        if not self._bar and now - self._last_log >= LOG_SECONDS:
            self._last_log = now
            self._log(_status_line(done, total, rate, eta, counts))

    def finish(self, done: int, total: int | None, message: str, **counts: Any) -> None:
        """Write the last heartbeat, remove the bar and print ``message``."""
        rate, _ = self._rate_and_eta(done, total, None)
        self._heartbeat.beat(
            unit="token", done=done, total=total, rate=rate, eta_s=0.0, last=True, message=message, **counts
        )
        self.close()
        self.log(message)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar:
            self._bar.close()
            self._bar = None

    def seconds(self) -> float:
        """Return the seconds since the work began."""
        return time.monotonic() - self._started

    def _rate_and_eta(self, done: int, total: int | None, fraction: float | None) -> tuple[float, float | None]:
        seconds = max(self.seconds(), 1e-9)
        rate = (done - self._done_at_start) / seconds
        if total is not None:
            return rate, (total - done) / rate if rate > 0 else None
        return rate, seconds * (1 - fraction) / fraction if fraction else None


def _status_line(done: int, total: int | None, rate: float, eta: float | None, counts: dict[str, Any]) -> str:
    progress_text = f"{done:,} tokens" if total is None else f"{done:,} of {total:,} tokens"
    parts = [progress_text]
    parts += [f"{name} {value:,}" for name, value in counts.items() if isinstance(value, int)]
    parts.append(f"{rate:,.0f} tokens/s")
    if "mb_per_s" in counts:
        parts.append(f"{counts['mb_per_s']:.1f} MB/s")
    if eta is not None:
        parts.append(f"{eta:,.0f} s left")
    return ", ".join(parts)


class ProgressBar:
    """One live line at the bottom of a terminal."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self._progress = Progress(BarColumn(bar_width=24), TextColumn("{task.description}"), transient=True)
        self._task = self._progress.add_task("", total=None)
        self._progress.start()

    def draw(self, text: str, fraction: float | None) -> None:
        """Show ``text`` and the share of the work that is done; None animates the bar without a position."""
        total = None if fraction is None else 1.0
        self._progress.update(self._task, description=text, total=total, completed=fraction or 0.0)

    def print_above(self, text: str) -> None:
        """Print a line above the bar."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar."""
        self._progress.stop()


def stdout_is_terminal() -> bool:
    """Return True if stdout is a terminal."""
    return sys.stdout.isatty()
