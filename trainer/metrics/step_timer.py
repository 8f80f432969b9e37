"""Where the time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Where the time between two steps' lines goes: steps, and kept apart waiting for data, validation and checkpoints."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._parts = dict.fromkeys(("data", "validation", "checkpoint"), 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What is done here is ``name``."""
        began = time.perf_counter()
        yield
        self._parts[name] += time.perf_counter() - began

    def lap(self) -> dict[str, float]:
        """Seconds since the last lap, by part; ``step`` includes the waiting for data."""
        now = time.perf_counter()
        parts = {"step": now - self._since - self._parts["validation"] - self._parts["checkpoint"], **self._parts}
        self._since, self._parts = now, dict.fromkeys(self._parts, 0.0)
        return parts
