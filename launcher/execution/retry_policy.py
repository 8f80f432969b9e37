"""Whether an element that ended unfinished is started again by itself. Pure: decided from its own record alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from amlaunch.launcher.runs.states import State

MAX_WITHOUT_PROGRESS = 3
"""Attempts in a row that may get no further than the one before."""


def goes_again(lines: Sequence[Mapping[str, Any]], end: Mapping[str, Any], done: float) -> tuple[bool, str]:
    """``(whether to start again, why or why not)``, from ``attempts.jsonl``, how the newest attempt ended, and its progress.

    Stopped by a signal (time limit, preemption): again, with what was saved. Ended from outside (a killed rank, a lost
    node): again. An error of the recipe or the code, or a stop that somebody asked for: not. Never for ever: not when
    :data:`MAX_WITHOUT_PROGRESS` attempts in a row got no further.
    """
    if not end.get("again"):
        return False, ""
    futile = futile_attempts(lines, done)
    if futile >= MAX_WITHOUT_PROGRESS:
        return False, f"no progress in {futile} attempts"
    return True, "goes on from what is saved" if end.get(
        "outcome"
    ) == State.STOPPED else f"tried again ({futile + 1} of {MAX_WITHOUT_PROGRESS} without progress)"


def futile_attempts(lines: Sequence[Mapping[str, Any]], done: float) -> int:
    """How many attempts of this job or launcher in a row, the newest included, began where the element still is."""
    count = 0
    starts = [line for line in lines if line.get("event") == "start"]
    for start in reversed(starts):
        if start.get("done", 0) < done or start.get("budget") != starts[-1].get("budget"):
            break
        count += 1
    return count
