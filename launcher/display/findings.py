"""Findings of ``doctor`` and ``image check``: a subject, a verdict and advice; and the report that prints them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from amlaunch.launcher.display import wording

OK, WARN, BAD = "ok", "warn", "bad"
"""Verdicts: works; works with a restriction; will not work."""
COLORS = {OK: "green", WARN: "yellow", BAD: "bold red"}
MAX_WIDTH = 110
NAME_WIDTH = 11
"""Columns of a finding's name."""


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


class FindingsReport:
    """Print findings as they arrive; with ``json_output`` only collect them."""

    def __init__(self, json_output: bool):
        self.json_output = json_output
        self.facts: dict[str, Any] = {}
        self.findings: list[tuple[str, Finding]] = []
        """Each finding with its topic."""
        self.topic = ""

    def begin(self, topic: str, title: str) -> None:
        """Start a section; findings added from now on belong to ``topic``."""
        self.show(f"\n{title}" if self.topic else title)
        self.topic = topic

    def add(self, findings: Iterable[Finding]) -> None:
        """Keep findings and print them."""
        for finding in findings:
            self.findings.append((self.topic, finding))
            self.show(_finding_text(finding))

    def show(self, renderable: Any) -> None:
        """Print text or a table, unless the output is JSON."""
        if not self.json_output:
            wording.console().print(renderable, markup=False)


def _finding_text(finding: Finding) -> Any:
    from rich.text import Text

    lead = f"  {finding.verdict:<4}  {finding.name:<{NAME_WIDTH}} "
    lines = _wrap(finding.text, lead)
    if finding.advice:
        lines += _wrap(finding.advice, " " * len(lead) + "-> ")

    text = Text("\n".join(lines))
    text.stylize(COLORS[finding.verdict], 2, 2 + len(finding.verdict))
    return text


def _wrap(text: str, lead: str) -> list[str]:
    """Wrap text after ``lead``; paths and commands stay in one piece, so that they can be copied."""
    return textwrap.wrap(
        text,
        min(wording.console().width, MAX_WIDTH),
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_long_words=False,
        break_on_hyphens=False,
    )
