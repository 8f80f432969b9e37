"""Records: a document's text, or the reason why a record has none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SkippedRecord:
    """A record without a document: ``null``, ``undecodable``, …"""

    reason: str


@dataclass(frozen=True)
class DamagedRecord:
    """A record that cannot be read; ``preprocess.on_error`` decides whether it is an error or skipped."""

    reason: str
    """The counter it belongs to: ``not JSON``, ``not text``, …"""
    message: str
    """The record's place, and the problem."""


Record = str | SkippedRecord | DamagedRecord
"""A document's text, or the reason why there is none."""
