"""Read single values from JSON records of a run directory, ignoring damaged ones.

A damaged file of one element must not hide the state of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]


def text(record: Record, key: str) -> str:
    """Return a string; empty if the value is missing or of another type."""
    value = record.get(key)
    return value if isinstance(value, str) else ""


def number(record: Record, key: str) -> float | None:
    """Return a number; None if the value is missing or of another type."""
    value = record.get(key)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def integer(record: Record, key: str) -> int | None:
    """Return an integer; None if the value is missing or of another type."""
    value = record.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def without_empty(record: Record) -> dict[str, Any]:
    """Return the record without keys whose value is None or an empty string."""
    return {key: value for key, value in record.items() if value is not None and value != ""}
