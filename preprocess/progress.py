"""How far an element is, for people and for ``progress.json``; and the request to stop soon."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import Any, NoReturn

from recipes.rundir import ElementDir, Heartbeat

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LOG_SECONDS = 5.0
LOOK_SECONDS = 1.0


class StopRequested(BaseException):
    """Leave now; what is whole stays, what is half goes. Not an Exception, so that no library swallows it."""


def stop_on_signals() -> None:
    """Turn SIGTERM, SIGINT and SIGUSR1 into StopRequested, at once: every write is atomic, so no moment is wrong."""

    def stop(number: int, _frame: Any) -> NoReturn:
        for other in SIGNALS:  # the clean-up is not to be disturbed
            signal.signal(other, signal.SIG_IGN)
        raise StopRequested(signal.Signals(number).name)

    for number in SIGNALS:
        signal.signal(number, stop)


class Progress:
    """Speaks on stdout every few seconds, beats once a second, and looks for the element's ``stop`` file."""

    def __init__(self, folder: ElementDir | None = None, say: Callable[[str], None] | None = None):
        self.folder = folder
        self.say = say or (lambda text: print(text, flush=True))
        self._heartbeat = Heartbeat(folder.progress if folder else None)
        self._started = self._looked = self._logged = time.monotonic()
        self._from = 0

    def begin(self, done: int) -> None:
        """Count the rate from here: ``done`` tokens were there already."""
        self._from = done
        self._started = time.monotonic()

    def update(self, done: int, total: int | None, **more: Any) -> None:
        """Say that ``done`` of ``total`` tokens are there; cheap enough for every document. Raises StopRequested."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if self.folder is not None and self.folder.stop.exists():
            raise StopRequested("stop file")
        rate, eta = self._rate(done, total)
        self._heartbeat.beat(unit="token", done=done, total=total, rate=rate, eta_s=eta, **more)
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            self.say(_line(done, total, rate, eta, more))

    def finish(self, done: int, total: int | None, message: str, **more: Any) -> None:
        """The last word."""
        rate, _ = self._rate(done, total)
        self._heartbeat.beat(
            unit="token", done=done, total=total, rate=rate, eta_s=0.0, last=True, message=message, **more
        )
        self.say(message)

    def _rate(self, done: int, total: int | None) -> tuple[float, float | None]:
        rate = (done - self._from) / max(time.monotonic() - self._started, 1e-9)
        return rate, (total - done) / rate if total is not None and rate > 0 else None


def _line(done: int, total: int | None, rate: float, eta: float | None, more: dict[str, Any]) -> str:
    of = f" of {total:,}" if total is not None else ""
    left = f", {eta:,.0f} s left" if eta is not None else ""
    rest = "".join(f", {key} {value:,}" for key, value in more.items() if isinstance(value, int))
    return f"{done:,}{of} tokens{rest}, {rate:,.0f} tokens/s{left}"
