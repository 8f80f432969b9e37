"""The states of an element and the outcomes of an attempt. The values are what JSON on disk and ``--json`` contain."""

from __future__ import annotations

from enum import Enum


class State(str, Enum):
    """The state of an element, most urgent first."""

    FAILED = "failed"
    DIED = "died"
    """An attempt started and recorded no end: it was killed together with its driver, for example."""
    UNKNOWN = "unknown"
    """Neither the element's files nor Slurm can tell."""
    CANCELLED = "cancelled"
    RUNNING = "running"
    QUEUED = "queued"
    """Slurm has the element and will start it."""
    STOPPED = "stopped"
    PENDING = "pending"
    """Nobody has submitted the element yet."""
    DONE = "done"

    def __str__(self) -> str:
        return str(self.value)


class Outcome(str, Enum):
    """The outcome of an attempt."""

    DONE = "done"
    STOPPED = "stopped"
    """The ranks were asked to save and stop, and did."""
    FAILED = "failed"
    CANCELLED = "cancelled"
    """The attempt was ended from outside, or its inputs were missing."""
    LOCKED = "pending"
    """Another driver holds the element's lock: no attempt was made."""
    UNREADABLE = "died"
    """The recorded outcome is not one of these."""

    def __str__(self) -> str:
        return str(self.value)


ACTIVE_STATES = (State.RUNNING, State.QUEUED)
"""States that change without anybody's help."""
BROKEN_STATES = (State.FAILED, State.DIED, State.UNKNOWN)
"""States in which an element cannot have finished and needs attention."""
