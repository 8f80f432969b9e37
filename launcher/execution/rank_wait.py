"""Wait for the ranks of an attempt: one that fails ends the others, and so do an overdue stop and a hang."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from amlaunch.launcher.execution.attempt import Attempt
from amlaunch.launcher.execution.stop_request import FILE_CHECK_SECONDS, StopRequest
from amlaunch.recipes.errors import BAD_INPUT, HANG, RESUMABLE

POLL_SECONDS = 0.05
SIBLING_SECONDS = 5.0
"""Time for the other ranks to notice that one has failed."""

Processes = list["subprocess.Popen[bytes]"]
"""The ranks of an attempt, or the one srun that stands for all of them."""


@dataclass(frozen=True)
class RanksEnd:
    """The exit codes of all ranks, negative for signals, and which rank failed first."""

    codes: tuple[int, ...]
    first_failed: int | None = None
    hung: bool = False


class RankWatch:
    """Detects ranks that hang: no heartbeat, and no new line in any of their logs."""

    def __init__(self, attempt: Attempt):
        self.hung = False
        self._limit = attempt.stage.needs.hang_seconds
        logs = (attempt.log(rank) for rank in range(attempt.ranks))
        self._files = [attempt.folder.progress, attempt.folder.metrics, *logs]
        self._signs: list[float] = []
        self._changed_at = self._checked_at = time.monotonic()

    def poll(self) -> bool:
        """Return True if nothing has changed for longer than ``hang_seconds``."""
        now = time.monotonic()
        if self._limit is None or now - self._checked_at < FILE_CHECK_SECONDS:
            return self.hung
        self._checked_at = now
        signs = [_sign_of_life(path) for path in self._files]
        if signs != self._signs:
            self._signs, self._changed_at = signs, now
        self.hung = now - self._changed_at > self._limit
        return self.hung


def _sign_of_life(path: Path) -> float:
    """Return a number that changes whenever the file does."""
    try:
        status = path.stat()
    except OSError:
        return 0.0
    return status.st_mtime + status.st_size


def wait_for(ranks: Processes, stop: StopRequest, watch: RankWatch | None = None) -> RanksEnd:
    """Wait until all ranks have ended.

    A stop request is forwarded once. Ranks are killed if they do not stop in time, if they hang, and if another rank
    failed :data:`SIBLING_SECONDS` ago.
    """
    forwarded = False
    failed_at = 0.0
    first_failed: int | None = None
    while True:
        codes = [rank.poll() for rank in ranks]
        if None not in codes:
            break
        now = time.monotonic()
        if stop.poll() and not forwarded:
            _signal_running(ranks, signal.SIGTERM)
            forwarded = True
        if first_failed is None and any(codes):
            first_failed, failed_at = first_failed_rank(codes), now
        hung = watch is not None and watch.poll()
        siblings_are_late = first_failed is not None and now - failed_at > SIBLING_SECONDS
        if stop.is_overdue or hung or siblings_are_late:
            _signal_running(ranks, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    final_codes = tuple(code or 0 for code in codes)
    if first_failed is None:
        first_failed = first_failed_rank(final_codes)
    return RanksEnd(final_codes, first_failed, watch is not None and watch.hung)


def _signal_running(ranks: Processes, number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


EXIT_CODE_PRIORITY: tuple[Callable[[int], bool], ...] = (
    lambda code: code == BAD_INPUT,
    lambda code: code == HANG,
    lambda code: code < 0,
    lambda code: code not in (0, RESUMABLE),
)
"""The exit code to look at, the most telling first: bad input, a hang, a kill from outside, any other error."""


def first_failed_rank(codes: Sequence[int | None]) -> int | None:
    """Return the rank to blame among ranks that ended within one poll; None if none failed.

    A rank that loses its peer fails with an error of its own a moment later, so the order of ranks tells nothing.
    """
    for is_culprit in EXIT_CODE_PRIORITY:
        for rank, code in enumerate(codes):
            if code is not None and is_culprit(code):
                return rank
    return None
