"""Findings of doctor and of image checks: what was looked at, a verdict and advice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OK, WARN, BAD = "ok", "warn", "bad"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    verdict: str
    """ok, warn (works, but) or bad (will not work)."""
    text: str
    advice: str = ""
    """What to do about it, where it is not ok."""


def worst(findings: Iterable[Finding]) -> str:
    """The verdict on all of them together."""
    return max((one.verdict for one in findings), key=(OK, WARN, BAD).index, default=OK)
