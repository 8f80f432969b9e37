"""Measure the time between two steps, by activity."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StepTimer:
    """Splits the time between two reported steps into training, waiting for data, validation and checkpoints."""

    def __init__(self) -> None:
        self._lap_start = time.perf_counter()
        self._seconds = dict.fromkeys(("data", "validation", "checkpoint"), 0.0)

    @contextmanager
    def measure(self, activity: str) -> Iterator[None]:
        """Add the time spent in this context to ``activity``: data, validation or checkpoint."""
        started = time.perf_counter()
        yield
        self._seconds[activity] += time.perf_counter() - started

    def lap(self) -> dict[str, float]:
        """Return the seconds since the last lap by activity; ``step`` includes waiting for data."""
        now = time.perf_counter()
        step = now - self._lap_start - self._seconds["validation"] - self._seconds["checkpoint"]
        seconds = {"step": step, **self._seconds}
        self._lap_start, self._seconds = now, dict.fromkeys(self._seconds, 0.0)
        return seconds
