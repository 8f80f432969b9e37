"""What a source is read into: documents, and places where one is missing for a known reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Skipped:
    """A record without a document: ``null``, ``undecodable``, …"""

    reason: str


@dataclass(frozen=True)
class Bad:
    """A record that is damaged; what that means, ``preprocess.on_error`` decides."""

    reason: str
    """What is counted: ``not JSON``, ``not text``, …"""
    message: str
    """Which record, and what is wrong with it."""


Record = str | Skipped | Bad
"""A document's text, or why there is none."""
