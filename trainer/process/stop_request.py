"""Requests to save and stop, by signal or by file.

Uses only the standard library, so that the signal handlers are installed before torch loads.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """True once this process should save a checkpoint and stop at the next step."""

    def __init__(self) -> None:
        self._signalled = False
        self.file: Path | None = None
        """Its existence is a stop request, too."""
        self.polls_file = True
        """True if this rank looks for the file at every step; one rank is enough if thousands share a file system."""

    def install(self) -> None:
        """Handle SIGTERM (preemption), SIGINT (Ctrl-C) and SIGUSR1 (time limit near)."""
        for number in SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._signalled and number == signal.SIGINT:
            # A second Ctrl-C means now.
            raise KeyboardInterrupt
        self._signalled = True

    def requested(self, *, poll: bool = False) -> bool:
        """Return True after the first signal or while the file exists; ``poll`` looks for the file on any rank."""
        if self._signalled:
            return True
        return self.file is not None and (poll or self.polls_file) and self.file.exists()
