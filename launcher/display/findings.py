"""Findings of ``doctor`` and of image checks: a subject, a verdict and advice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OK, WARN, BAD = "ok", "warn", "bad"
"""Verdicts: works; works with a restriction; will not work."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    name: str
    verdict: str
    """One of :data:`OK`, :data:`WARN`, :data:`BAD`."""
    text: str
    advice: str = ""
    """The remedy, if the verdict is not ok."""


def worst(findings: Iterable[Finding]) -> str:
    """Return the worst verdict of all findings; ok if there are none."""
    return max((finding.verdict for finding in findings), key=(OK, WARN, BAD).index, default=OK)
