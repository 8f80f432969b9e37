"""Keep training while the disk is full: metrics and heartbeat must not end a run.

Saves survive a full disk, which they usually share with the metrics. For the log see
:mod:`amlaunch.trainer.process.console`.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

from amlaunch.recipes.files import append_json_line
from amlaunch.trainer.process.console import DISK_FULL

MAX_WAITING_LINES = 100_000
"""About 60 MB; the oldest are dropped first."""


class MetricsFile:
    """``metrics.jsonl``, whose lines wait in memory while the disk is full."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting: deque[dict[str, Any]] = deque(maxlen=MAX_WAITING_LINES)
        self._is_reported = False

    def append(self, line: dict[str, Any]) -> None:
        """Write a line after those that wait; if the disk is full, print a warning once and keep it."""
        self.waiting.append(line)
        self.flush()

    def flush(self) -> None:
        """Write the lines that wait, in order."""
        while self.waiting:
            try:
                append_json_line(self.path, self.waiting[0])
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                if not self._is_reported:
                    warn(
                        f"cannot write {self.path} ({error.strerror}); its lines wait in memory, and training continues"
                    )
                self._is_reported = True
                return
            self.waiting.popleft()
        if self._is_reported:
            warn(f"{self.path} can be written again, and has all its lines")
        self._is_reported = False

    def close(self) -> None:
        """Write what waits; print a warning if it is lost."""
        self.flush()
        if self.waiting:
            warn(f"{self.path} lacks its last {len(self.waiting)} lines: the disk is full")


def warn(text: str) -> None:
    """Print a warning on stdout, the rank's log."""
    print(f"warning: {text}", flush=True)


def show_life(path: Path) -> None:
    """Set the modification time of a heartbeat that cannot be written, so that its rank is not taken for hanging."""
    if path.exists():
        os.utime(path)
