"""The record of an element's attempts: ``attempts.jsonl``, one line when an attempt starts and one when it ends."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amlaunch.launcher.runs.json_fields import Record, integer, number, text, without_empty
from amlaunch.launcher.runs.states import Outcome
from amlaunch.recipes.files import append_json_line, read_json_lines

AVOID_SECONDS = 3600.0
"""Seconds for which an element's retries avoid a node on which one of its attempts failed."""


@dataclass(frozen=True)
class AttemptStart:
    """The start of an attempt."""

    attempt: int
    time: float = field(default_factory=time.time)
    """Unix seconds."""
    host: str = ""
    pid: int | None = None
    job: str = ""
    """Slurm job ID (``123_4``), or the process ID of a local driver."""
    budget: str = ""
    """Attempts with the same budget count together towards the retry limit."""
    done: float = 0
    """Saved progress at the start, in the stage's own unit."""
    gpus: float = 0
    """Number of GPUs on all nodes."""
    nodes: str = ""
    """Slurm node list."""
    restarts: int | None = None
    """Number of times Slurm has requeued the job."""

    @property
    def is_array_task(self) -> bool:
        """Return True if a task of a Slurm array made this attempt."""
        return "_" in self.job

    def to_json(self) -> dict[str, Any]:
        """Return the line of ``attempts.jsonl``."""
        return {"event": "start", **without_empty(vars(self))}

    @staticmethod
    def from_json(record: Record) -> AttemptStart | None:
        """Read a line of ``attempts.jsonl``; None without an attempt number and a time."""
        attempt, started = integer(record, "attempt"), number(record, "time")
        if attempt is None or started is None:
            return None
        return AttemptStart(
            attempt,
            started,
            host=text(record, "host"),
            pid=integer(record, "pid"),
            job=text(record, "job"),
            budget=text(record, "budget"),
            done=number(record, "done") or 0,
            gpus=number(record, "gpus") or 0,
            nodes=text(record, "nodes"),
            restarts=integer(record, "restarts"),
        )


@dataclass(frozen=True)
class AttemptEnd:
    """The end of an attempt, and whether the element can or will be started again."""

    outcome: Outcome
    reason: str = ""
    rank: int | None = None
    """The rank whose log explains the failure."""
    host: str = ""
    """The node of that rank."""
    kind: str = ""
    """A short name of the cause, once it is known."""
    retryable: bool = True
    """False if the same recipe would fail again."""
    restart: bool = False
    """True if the driver restarts the element automatically."""
    avoid_host: bool = False
    """True if the retry must run on another node."""
    killed: bool = False
    """True if the rank was killed from outside, perhaps for lack of memory; not recorded."""
    exit_codes: tuple[int, ...] = ()
    seconds: float | None = None
    attempt: int = 0
    time: float = field(default_factory=time.time)
    """Unix seconds."""

    @property
    def is_unexplained(self) -> bool:
        """Return True for a failure whose cause is still to be found in the logs."""
        return self.outcome == Outcome.FAILED and self.retryable and not self.kind

    def to_json(self) -> dict[str, Any]:
        """Return the line of ``attempts.jsonl``."""
        record = {
            "attempt": self.attempt,
            "time": self.time,
            "seconds": self.seconds,
            "outcome": str(self.outcome),
            "reason": self.reason,
            "rank": self.rank,
            "host": self.host,
            "kind": self.kind,
            "retry": self.retryable,
            "again": self.restart,
            "elsewhere": self.avoid_host,
            "exit_codes": list(self.exit_codes) or None,
        }
        return {"event": "end", **without_empty(record)}

    @staticmethod
    def from_json(record: Record) -> AttemptEnd:
        """Read a line of ``attempts.jsonl``; missing keys have their defaults."""
        codes = record.get("exit_codes")
        return AttemptEnd(
            _outcome(record),
            reason=text(record, "reason"),
            rank=integer(record, "rank"),
            host=text(record, "host"),
            kind=text(record, "kind"),
            retryable=record.get("retry") is not False,
            restart=bool(record.get("again")),
            avoid_host=bool(record.get("elsewhere")),
            exit_codes=tuple(code for code in codes if isinstance(code, int)) if isinstance(codes, list) else (),
            seconds=number(record, "seconds"),
            attempt=integer(record, "attempt") or 0,
            time=number(record, "time") or 0.0,
        )


def _outcome(record: Record) -> Outcome:
    try:
        return Outcome(text(record, "outcome"))
    except ValueError:
        return Outcome.UNREADABLE


@dataclass(frozen=True)
class AttemptHistory:
    """All attempts of one element, oldest first."""

    starts: tuple[AttemptStart, ...] = ()
    ends: tuple[AttemptEnd, ...] = ()

    @staticmethod
    def read(path: Path) -> AttemptHistory:
        """Read ``attempts.jsonl``; damaged lines are left out, and a missing file has no attempts."""
        return AttemptHistory.from_json(read_json_lines(path))

    @staticmethod
    def from_json(records: Iterable[Record]) -> AttemptHistory:
        """Build the history from the lines of ``attempts.jsonl``."""
        lines = list(records)
        starts = (AttemptStart.from_json(line) for line in lines if line.get("event") == "start")
        ends = (AttemptEnd.from_json(line) for line in lines if line.get("event") == "end")
        return AttemptHistory(tuple(start for start in starts if start is not None), tuple(ends))

    @property
    def newest_start(self) -> AttemptStart | None:
        """The start of the newest attempt."""
        return self.starts[-1] if self.starts else None

    @property
    def newest_end(self) -> AttemptEnd | None:
        """The end of the newest attempt; None if it has not ended, or recorded no end."""
        newest = self.newest_start
        return self.end_of(newest) if newest else None

    def end_of(self, start: AttemptStart) -> AttemptEnd | None:
        """Return the last recorded end of an attempt."""
        return next((end for end in reversed(self.ends) if end.attempt == start.attempt), None)

    @property
    def next_number(self) -> int:
        """The number of the next attempt."""
        return 1 + max((start.attempt for start in self.starts), default=0)

    @property
    def last_time(self) -> float:
        """The time of the newest line in Unix seconds; 0 without any."""
        times = [*(start.time for start in self.starts), *(end.time for end in self.ends)]
        return max(times, default=0.0)

    def hosts_to_avoid(self, now: float | None = None) -> list[str]:
        """Return the nodes that failed the element within :data:`AVOID_SECONDS`, by name."""
        oldest = (time.time() if now is None else now) - AVOID_SECONDS
        return sorted({end.host for end in self.ends if end.avoid_host and end.host and end.time > oldest})


def append_attempt(path: Path, line: AttemptStart | AttemptEnd) -> None:
    """Add a line to ``attempts.jsonl``."""
    append_json_line(path, line.to_json())
