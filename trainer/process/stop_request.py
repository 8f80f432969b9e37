"""Being asked to stop soon: by signal or by a file. Standard library only, so that handlers stand before torch loads."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopFlag:
    """Whether this process was asked to save and leave at the next step."""

    def __init__(self) -> None:
        self._asked = False
        self.file: Path | None = None
        """Asks too, when it exists."""
        self.polls_file = True
        """Whether this rank looks for the file at every step: one is enough, where thousands share a file system."""

    def install(self) -> None:
        """Take over SIGTERM (preemption), SIGINT (Ctrl-C) and SIGUSR1 (the time limit is near)."""
        for number in SIGNALS:
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means now
        self._asked = True

    def requested(self, *, poll: bool = False) -> bool:
        """True from the first signal on, or while the file is there; ``poll`` for it in any case."""
        return self._asked or (self.file is not None and (poll or self.polls_file) and self.file.exists())
