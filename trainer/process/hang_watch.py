"""A rank that gets nowhere says where it stands, and ends the job with the exit code that means "hang".

Standard library only. The driver has a watch of its own, over heartbeats and
logs (``resources.train.hang_minutes``); this one is earlier, and knows what the
threads do: it also works under a plain torchrun.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

from amlaunch.recipes.errors import HANG

LAST_RESORT = 5.0
"""Seconds after the limit at which C code dumps the stacks, where a thread that holds Python's lock hangs."""
COURTESY = 3.0
"""Seconds that a rank which only waits for others leaves them to speak first."""
REARM = 5.0
"""Seconds between two settings of that last resort."""


class HangWatch:
    """Ends the process when :meth:`beat` has not been called for ``limit`` seconds (``first`` before the first step)."""

    def __init__(self, rank: int, limit: float, first: float, also: Callable[[], None] = lambda: None):
        self._rank = rank
        self._limit = limit
        self._first = first
        self._also = also
        self._out: TextIO = sys.__stderr__ or sys.stderr
        self._allowed = first
        self._since = self._armed = time.monotonic()
        self._where = "getting ready"
        self._courtesy = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> HangWatch:
        self._arm()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def at(self, where: str, *, others: bool = False) -> None:
        """What is waited for from here on; ``others``: the other ranks, of which the one that hangs should speak first."""
        self._where = where
        self._courtesy = COURTESY if others else 0.0

    def beat(self, where: str, *, steady: bool = True) -> None:
        """Something was done; ``where``: what comes next. Not ``steady``: it may take as long as the first step."""
        self._where, self._courtesy = where, 0.0
        self._allowed = self._limit if steady else self._first
        self._since = time.monotonic()
        if self._since - self._armed > REARM:
            self._arm()

    def _arm(self) -> None:
        self._armed = time.monotonic()
        faulthandler.dump_traceback_later(self._allowed + LAST_RESORT + REARM, file=self._out)

    def _look(self) -> None:
        while not self._done.wait(min(1.0, self._allowed / 4)):
            silent = time.monotonic() - self._since
            if silent > self._allowed + self._courtesy:
                self._end(silent)

    def _end(self, silent: float) -> None:
        out = self._out
        print(
            f"error: rank {self._rank} on {platform.node()} hangs: nothing done for {silent:.0f} s while {self._where}; its threads:",
            file=out,
            flush=True,
        )
        faulthandler.dump_traceback(file=out, all_threads=True)
        try:
            self._also()
        finally:
            out.flush()
            os._exit(HANG)


def hang_limits(
    timeout_minutes: float, hang_minutes: float | None, hang_seconds: float | None, default_minutes: float = 30.0
) -> tuple[float, float]:
    """``(between steps, before the first)`` in seconds: before peers' collectives time out, and before the driver ends all."""
    longest = 0.9 * 60.0 * (hang_minutes or default_minutes)
    steady = float(hang_seconds) if hang_seconds else min(longest, 0.9 * 60.0 * timeout_minutes)
    return steady, max(longest, steady)
