"""The files of one element: its done marker, its newest heartbeat, and the record of its attempts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from amlaunch.launcher.runs.attempt_record import AttemptHistory
from amlaunch.launcher.runs.json_fields import Record, number, text
from amlaunch.recipes.files import read_object
from amlaunch.recipes.output import counted
from amlaunch.recipes.run_layout import ElementDir

NUMBER = (int, float)
Types = Mapping[str, type | tuple[type, ...]]
PROGRESS_TYPES: Types = {
    **dict.fromkeys(("time", "done", "total", "rate", "eta_s", "loss", "val_loss", "saved"), NUMBER),
    "unit": str,
}
"""Types of the values of ``progress.json`` that are displayed."""
RESULT_TYPES: Types = {
    **dict.fromkeys(
        ("time", "seconds", "tokens", "documents", "shards", "parameters", "tokens_per_s", "loss_first", "loss_last"),
        NUMBER,
    ),
    **dict.fromkeys(("sample", "checkpoint"), str),
}
"""Types of the values of ``done.json`` that are displayed."""
NULLABLE = ("total", "rate", "eta_s", "loss", "val_loss", "sample", "tokens_per_s", "loss_first", "loss_last")
"""Keys whose value may be null because it is not known yet."""


@dataclass(frozen=True)
class ElementProgress:
    """The newest heartbeat of an element: ``progress.json``."""

    unit: str = ""
    """The unit of ``done``, ``total`` and ``saved``: ``step``, ``token``."""
    done: float | None = None
    total: float | None = None
    saved: float | None = None
    """The position from which the element would continue."""
    rate: float | None = None
    """Tokens per second."""
    eta_seconds: float | None = None
    loss: float | None = None
    val_loss: float | None = None
    time: float = 0.0
    """Unix seconds."""
    record: dict[str, Any] = field(default_factory=dict)
    """The complete file, for ``--json``."""

    @property
    def saved_position(self) -> float | None:
        """The position from which the element would continue; stages without checkpoints save all that is done."""
        return self.done if self.saved is None else self.saved

    @staticmethod
    def from_json(record: Record) -> ElementProgress:
        """Build the progress from ``progress.json``, without damaged values."""
        return ElementProgress(
            unit=text(record, "unit"),
            done=number(record, "done"),
            total=number(record, "total"),
            saved=number(record, "saved"),
            rate=number(record, "rate"),
            eta_seconds=number(record, "eta_s"),
            loss=number(record, "loss"),
            val_loss=number(record, "val_loss"),
            time=number(record, "time") or 0.0,
            record=_valid_values(record, PROGRESS_TYPES),
        )


@dataclass(frozen=True)
class DoneMarker:
    """The marker of a finished element: ``done.json``."""

    outputs: Mapping[str, int]
    """Size in bytes of each output file."""
    record: dict[str, Any] = field(default_factory=dict)
    """The complete file, with the results of the stage."""

    @property
    def seconds(self) -> float | None:
        """The duration of the attempt that finished the element."""
        return number(self.record, "seconds")

    @property
    def missing_output(self) -> str | None:
        """Describe the first output that is missing or has another size; None if all are as recorded."""
        for name, size in self.outputs.items():
            try:
                actual = os.stat(name).st_size
            except OSError:
                return f"{name} is missing"
            if actual != size:
                return f"{name}: expected {counted(size, 'byte')}, got {actual:,}"
        return None


def read_done(folder: ElementDir) -> DoneMarker | None:
    """Read the marker of a finished element; None if it is missing or damaged."""
    record = read_object(folder.done)
    outputs = record.get("outputs")
    return DoneMarker(outputs, _valid_values(record, RESULT_TYPES)) if isinstance(outputs, dict) else None


def is_done(folder: ElementDir) -> bool:
    """Return True if the element has a marker and all its outputs are as recorded."""
    marker = read_done(folder)
    return marker is not None and marker.missing_output is None


@dataclass(frozen=True)
class ElementFiles:
    """The content of one element's files."""

    history: AttemptHistory = field(default_factory=AttemptHistory)
    done: DoneMarker | None = None
    """The marker, if all its outputs are as recorded."""
    missing_output: str = ""
    """Set if there is a marker whose outputs are not as recorded."""
    progress: ElementProgress = field(default_factory=ElementProgress)

    @property
    def last_sign_of_life(self) -> float:
        """The time of the newest heartbeat or record in Unix seconds; 0 without any."""
        return max(self.progress.time, self.history.last_time)

    @property
    def awaits_heartbeat(self) -> bool:
        """True until the newest attempt has sent a heartbeat: :attr:`progress` is that of an earlier one.

        An attempt that has ended counts as an earlier one, because a new driver first takes the lock.
        """
        start = self.history.newest_start
        return start is not None and (self.history.newest_end is not None or self.progress.time < start.time)

    @property
    def attempt_spans(self) -> tuple[tuple[float, float], ...]:
        """Start and end of each attempt; one without a recorded end lasted until the last sign of life."""
        starts = self.history.starts
        # The start of the next attempt is a sign of life of this one.
        fallbacks = [*(start.time for start in starts[1:]), self.progress.time]
        spans = []
        for start, fallback in zip(starts, fallbacks, strict=False):
            end = self.history.end_of(start)
            spans.append((start.time, max(start.time, end.time if end and end.time else fallback)))
        return tuple(spans)

    @property
    def gpu_hours(self) -> float:
        """GPUs times hours over all attempts."""
        pairs = zip(self.history.starts, self.attempt_spans, strict=True)
        return round(sum(start.gpus * (ended - began) / 3600 for start, (began, ended) in pairs), 4)


def read_element_files(folder: ElementDir) -> ElementFiles:
    """Read the files of one element."""
    marker = read_done(folder)
    missing = marker.missing_output if marker is not None else None
    return ElementFiles(
        AttemptHistory.read(folder.attempts),
        marker if missing is None else None,
        missing or "",
        ElementProgress.from_json(read_object(folder.progress)),
    )


def _valid_values(record: Record, types: Types) -> dict[str, Any]:
    """Drop values of the wrong type; keys without a known type are the stage's own and stay."""
    return {
        key: value
        for key, value in record.items()
        if key not in types or isinstance(value, types[key]) or (value is None and key in NULLABLE)
    }
