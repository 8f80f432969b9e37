"""A watchdog: a rank without progress prints its thread stacks and ends the job with the exit code for hangs.

Uses only the standard library. The driver also watches heartbeats and logs (``resources.train.hang_minutes``); this
watchdog fires earlier, knows the thread stacks, and also works under plain torchrun.
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

FAULTHANDLER_DELAY = 5.0
"""Seconds after the limit until C code dumps the stacks, in case a thread hangs while it holds Python's lock."""
PEER_GRACE = 3.0
"""Extra seconds for a rank that only waits for others, so that the rank that hangs reports first."""
REARM_INTERVAL = 5.0
"""Minimum seconds between two settings of the faulthandler timer."""


class HangWatch:
    """Ends the process if :meth:`beat` is not called for ``limit`` seconds (``first_limit`` before the first step).

    ``on_hang`` runs after the stacks are printed.
    """

    def __init__(self, rank: int, limit: float, first_limit: float, on_hang: Callable[[], None] = lambda: None):
        self._rank = rank
        self._limit = limit
        self._first_limit = first_limit
        self._on_hang = on_hang
        self._output: TextIO = sys.__stderr__ or sys.stderr
        self._current_limit = first_limit
        self._last_beat = self._last_armed = time.monotonic()
        self._activity = "starting up"
        self._grace = 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watch", daemon=True)

    def __enter__(self) -> HangWatch:
        self._arm()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()

    def set_activity(self, activity: str, *, waits_for_ranks: bool = False) -> None:
        """Record what the rank does from now on, without counting it as progress.

        ``waits_for_ranks``: it waits for other ranks, and the one that hangs should report first.
        """
        self._activity = activity
        self._grace = PEER_GRACE if waits_for_ranks else 0.0

    def beat(self, activity: str, *, steady: bool = True) -> None:
        """Record progress and the ``activity`` that comes next.

        ``steady`` False: the next activity may take as long as the first step.
        """
        self._activity, self._grace = activity, 0.0
        self._current_limit = self._limit if steady else self._first_limit
        self._last_beat = time.monotonic()
        if self._last_beat - self._last_armed > REARM_INTERVAL:
            self._arm()

    def _arm(self) -> None:
        self._last_armed = time.monotonic()
        delay = self._current_limit + FAULTHANDLER_DELAY + REARM_INTERVAL
        faulthandler.dump_traceback_later(delay, file=self._output)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._current_limit / 4)):
            idle_seconds = time.monotonic() - self._last_beat
            if idle_seconds > self._current_limit + self._grace:
                self._end_process(idle_seconds)

    def _end_process(self, idle_seconds: float) -> None:
        # The launcher recognises a hang by the beginning of this line.
        print(
            f"error: rank {self._rank} on {platform.node()} hangs: no progress for {idle_seconds:.0f} s "
            f"while {self._activity}. Thread stacks:",
            file=self._output,
            flush=True,
        )
        faulthandler.dump_traceback(file=self._output, all_threads=True)
        try:
            self._on_hang()
        finally:
            self._output.flush()
            os._exit(HANG)


def hang_limits(
    timeout_minutes: float, hang_minutes: float | None, hang_seconds: float | None, default_minutes: float = 30.0
) -> tuple[float, float]:
    """Return the limits ``(between steps, before the first step)`` in seconds.

    They end before collectives time out on other ranks and before the driver ends the job.
    """
    longest = 0.9 * 60.0 * (hang_minutes or default_minutes)
    steady = float(hang_seconds) if hang_seconds else min(longest, 0.9 * 60.0 * timeout_minutes)
    return steady, max(longest, steady)
