"""The request to save and stop, as the driver receives it and passes it on to the ranks."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from amlaunch.launcher.execution.attempt import GRACE_SECONDS
from amlaunch.recipes.files import is_locked, read_object
from amlaunch.recipes.run_layout import ElementDir

FILE_CHECK_SECONDS = 1.0
"""Interval between two looks at files, which may lie on a file system that thousands of jobs share."""
LEAD_FACTOR = 2.0
"""The ranks are asked to stop this many times (step + save) before the time limit; Slurm's warning may come later."""
SPARE_SECONDS = 15.0
"""Time before the job's limit that the driver keeps for itself, to record how the attempt ended."""
REASONS = {
    signal.SIGUSR1: "the time limit is near",
    signal.SIGTERM: "terminated by a signal (preempted or cancelled)",
}


class StopRequest:
    """A request to the ranks to save and stop: its time, its origin, and its reason.

    ``launcher_lock``: a lock whose holder waits for the element. ``job_end``: the time limit in Unix seconds.
    """

    def __init__(
        self,
        folder: ElementDir,
        launcher_lock: Path | None = None,
        grace_seconds: float = GRACE_SECONDS,
        job_end: float | None = None,
    ):
        self.folder = folder
        self.launcher_lock = launcher_lock
        self.grace_seconds = grace_seconds
        self.job_end = job_end
        # However long a step and a save take, half of the job is for work.
        self.max_lead = (job_end - time.time()) / 2 if job_end else 0.0
        self.signal: int | None = None
        """The signal that asked; None if the request came through the stop file or from the end of the launcher."""
        self.launcher_ended = False
        self._requested_at: float | None = None
        self._files_checked_at = 0.0

    @property
    def is_set(self) -> bool:
        """True once the ranks should stop."""
        return self._requested_at is not None

    @property
    def came_by_signal(self) -> bool:
        """True if a signal asked to stop, and not a user through the stop file."""
        return self.signal is not None

    def set(self, signal_number: int | None = None, *_: Any) -> None:
        """Ask the ranks to stop, through the stop file (also usable as a signal handler)."""
        if self._requested_at is None:
            self._requested_at = time.monotonic()
            self.signal = signal_number
            self.folder.stop.touch()

    def poll(self) -> bool:
        """Look for a reason to stop: a signal, the stop file, the end of the launcher, or the time limit."""
        if self.is_set:
            return True
        if time.monotonic() - self._files_checked_at >= FILE_CHECK_SECONDS:
            self._files_checked_at = time.monotonic()
            self._check_files()
        return self.is_set

    def _check_files(self) -> None:
        if self.launcher_lock is not None and not is_locked(self.launcher_lock):
            self.launcher_ended = True
            self.set()
            return
        if self.folder.stop.exists():
            self.set()
            return
        if self.job_end is None:
            return
        lead = min(lead_seconds(self.folder), self.max_lead)
        if self.job_end - time.time() < lead:
            self.grace_seconds = max(self.grace_seconds, lead - SPARE_SECONDS)
            self.set(signal.SIGUSR1)

    @property
    def is_overdue(self) -> bool:
        """True if the ranks have used up their time to save."""
        return self._requested_at is not None and time.monotonic() - self._requested_at > self.grace_seconds

    @property
    def reason(self) -> str:
        """The reason for the stop."""
        if self.launcher_ended:
            return "stopped because the amlaunch process ended"
        if self.launcher_lock is not None and self.signal == signal.SIGTERM:
            # Nothing preempts a process of this machine.
            return "terminated by a signal"
        return REASONS.get(signal.Signals(self.signal), "stopped on request") if self.signal else "stopped on request"


def lead_seconds(folder: ElementDir) -> float:
    """Return how many seconds before the time limit the ranks must be asked to stop, from the newest heartbeat."""
    heartbeat = read_object(folder.progress)
    durations = (heartbeat.get(key) for key in ("step_seconds", "save_seconds"))
    return LEAD_FACTOR * sum(seconds for seconds in durations if isinstance(seconds, (int, float)))
