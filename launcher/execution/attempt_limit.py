"""End automatic restarts after several attempts without progress. Pure: depends on the element's own record alone.

Which failures are worth another attempt is decided per cause, in :mod:`amlaunch.launcher.runs.failure_causes`.
"""

from __future__ import annotations

from dataclasses import replace

from amlaunch.launcher.runs.attempt_record import AttemptEnd, AttemptHistory
from amlaunch.launcher.runs.states import Outcome

MAX_WITHOUT_PROGRESS = 3
"""Number of consecutive attempts that may end without progress."""


def limit_attempts(
    history: AttemptHistory, end: AttemptEnd, progress: float, *, restart_is_certain: bool = True
) -> AttemptEnd:
    """Return the end of the newest attempt, without ``restart`` if the limit is reached; ``reason`` explains it.

    The limit is :data:`MAX_WITHOUT_PROGRESS` consecutive attempts that saved nothing new. Unless
    ``restart_is_certain``, ``reason`` does not promise a restart.
    """
    if not end.restart:
        return end
    futile = futile_attempts(history, progress)
    if futile >= MAX_WITHOUT_PROGRESS:
        return replace(end, restart=False, reason=f"{end.reason}; no progress in {futile} attempts")
    if not restart_is_certain:
        return end
    if end.outcome == Outcome.STOPPED:
        return replace(end, reason=f"{end.reason}; continues automatically from the saved state")
    count = f"attempt {futile + 1} of {MAX_WITHOUT_PROGRESS} without progress"
    return replace(end, reason=f"{end.reason}; retried automatically ({count})")


def futile_attempts(history: AttemptHistory, progress: float) -> int:
    """Count the newest consecutive attempts of one budget that began where the element still is."""
    count = 0
    for start in reversed(history.starts):
        if start.done < progress or start.budget != history.starts[-1].budget:
            break
        count += 1
    return count
