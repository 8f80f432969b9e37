"""Determine how an attempt ended and why, from exit codes, the stop request, and the tails of logs."""

from __future__ import annotations

import os
import platform
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from amlaunch.containers.start_failures import advice, has_own_output
from amlaunch.containers.start_failures import failure_of as container_failure_of
from amlaunch.launcher.execution.attempt import Attempt
from amlaunch.launcher.execution.rank_wait import RanksEnd
from amlaunch.launcher.execution.stop_request import StopRequest
from amlaunch.launcher.planning.container_start import node_runtime
from amlaunch.launcher.runs.attempt_record import AttemptEnd
from amlaunch.launcher.runs.failure_causes import EXCEPTION, cause_of, exception_of, tail_of
from amlaunch.launcher.runs.states import Outcome
from amlaunch.recipes.errors import BAD_INPUT, FAILED, RESUMABLE

BEFORE_LISTENING = (-signal.SIGTERM, -signal.SIGUSR1)
"""Exit codes of a rank that was asked to stop before it had installed its signal handlers."""


def node_name() -> str:
    """Return this host's name: Slurm's name of the node inside a job."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def signal_name(number: int) -> str:
    """Return a signal's name: ``SIGKILL``; real-time signals have only numbers."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def classify(ranks: RanksEnd, result: Mapping[str, Any] | None, stop: StopRequest | None = None) -> AttemptEnd:
    """Return how an attempt ended, from exit codes, the stage's result, and the request to stop, if there was one."""
    if not any(ranks.codes):
        if result is None:
            return AttemptEnd(Outcome.FAILED, "exited with code 0 but left no result", rank=0)
        return AttemptEnd(Outcome.DONE)
    # A rank that our own signal ended had not begun to listen, and so had nothing to save.
    ended_on_request = (0, RESUMABLE, *(BEFORE_LISTENING if stop else ()))
    if ranks.first_failed is None or all(code in ended_on_request for code in ranks.codes):
        # The ranks received a signal that the driver did not: it went to all processes of the job.
        if stop is None:
            return AttemptEnd(Outcome.STOPPED, "the ranks were terminated by a signal", restart=True)
        return AttemptEnd(Outcome.STOPPED, stop.reason, restart=stop.came_by_signal)
    return failure_of(ranks.codes[ranks.first_failed], ranks.first_failed)


def failure_of(code: int, rank: int) -> AttemptEnd:
    """Return the failure that one rank's exit code stands for; negative codes are signals."""
    if code == BAD_INPUT:
        return AttemptEnd(Outcome.FAILED, "the recipe or its input is invalid", rank, retryable=False)
    if code < 0:
        reason = f"rank {rank} was killed by {signal_name(-code)}"
        return AttemptEnd(Outcome.FAILED, reason, rank, restart=True, killed=code == -signal.SIGKILL)
    return AttemptEnd(Outcome.FAILED, f"rank {rank} exited with code {code}", rank)


def hang_end(attempt: Attempt, end: AttemptEnd) -> AttemptEnd:
    """Return the end of an attempt whose ranks were killed because they hung."""
    seconds, stage = attempt.stage.needs.hang_seconds, attempt.stage.name
    reason = f"no sign of life for {seconds:.0f} s (resources.{stage}.hang_minutes)"
    failure = AttemptEnd(Outcome.FAILED, reason, end.rank, host=node_name(), kind="hang")
    return replace(failure, restart=True, avoid_host=True)


def stopped_before_start(attempt: Attempt, end: AttemptEnd, stop: StopRequest) -> AttemptEnd | None:
    """Return the end of an attempt that was asked to stop before a rank printed anything, so nothing is lost.

    A runtime that is told to end while it unpacks an image fails. None if a rank had begun, or the input is invalid.
    """
    logs = (tail_of(attempt.folder.log(attempt.number, rank)) for rank in range(attempt.ranks))
    if BAD_INPUT in end.exit_codes or any(has_own_output(log) for log in logs):
        return None
    return AttemptEnd(Outcome.STOPPED, stop.reason, restart=stop.came_by_signal)


def overdue_end(end: AttemptEnd, stop: StopRequest) -> AttemptEnd:
    """Return the end of an attempt whose ranks were killed because they did not save in time."""
    reason = (
        f"{stop.reason}, and the ranks did not save and stop within {stop.grace_seconds:.0f} s; "
        "earlier checkpoints are intact"
    )
    return replace(end, kind="overdue", reason=reason, retryable=True, restart=stop.came_by_signal)


def refused_end(verdict: Mapping[str, Any], codes: tuple[int, ...]) -> AttemptEnd:
    """Return the end of an attempt on whose nodes containers cannot start; ``verdict``: the file that a node left."""
    return AttemptEnd(
        Outcome.FAILED,
        str(verdict.get("reason", "")),
        rank=0,
        host=str(verdict.get("host", "")),
        kind=str(verdict.get("kind", "")),
        restart=bool(verdict.get("again")),
        avoid_host=bool(verdict.get("elsewhere")),
        exit_codes=codes,
    )


def with_error_message(attempt: Attempt, end: AttemptEnd) -> AttemptEnd:
    """Complete an end for invalid input by the error message, which one rank prints for all."""
    codes = end.exit_codes
    if BAD_INPUT not in codes:
        return end
    for rank in range(attempt.ranks):
        if rank < len(codes) and codes[rank] != BAD_INPUT:
            continue
        errors = _error_lines(attempt.folder.log(attempt.number, rank))
        if errors:
            return replace(end, rank=rank, reason=errors[-1].removeprefix("error: "))
    return end


def _error_lines(log: Path) -> list[str]:
    """Return the ``error:`` lines at the end of a rank's log; the trainer prints one only where it ends the run."""
    return [line for line in tail_of(log).splitlines() if line.startswith("error: ")]


def with_cause(attempt: Attempt, end: AttemptEnd) -> AttemptEnd:
    """Complete an unexplained failure by its cause, from the tails of the logs of the failed rank and the driver.

    The error that ended the rank decides. Then Slurm's words in the driver's log count, then any words in the rank's
    log: a warning that training survived must not explain an error of the code.
    """
    if not end.is_unexplained:
        return end
    rank_log, driver_log = (tail_of(attempt.folder.log(attempt.number, rank)) for rank in (end.rank or 0, None))
    by_container = _with_container_failure(attempt, end, f"{rank_log}\n{driver_log}")
    if by_container is not None:
        return by_container
    error = _fatal_error(attempt, end, rank_log)
    named = cause_of(error)
    cause = named or cause_of(driver_log) or (None if error else cause_of(rank_log))
    if cause is not None:
        reason = cause.explain(error if named else end.reason, attempt.stage.name)
        return replace(end, kind=cause.kind, restart=cause.restart, avoid_host=cause.avoid_host, reason=reason)
    if end.killed:
        return replace(end, reason=f"{end.reason} (out of memory?)")
    return replace(end, kind=EXCEPTION, reason=error) if error else end


def _fatal_error(attempt: Attempt, end: AttemptEnd, rank_log: str) -> str:
    """Return the exception or the ``error:`` line that ended a rank with exit code 1; empty if there is none.

    Rank 0 prints an error that all ranks have, and a rank its own. On Slurm the only exit code is srun's.
    """
    if end.restart or FAILED not in end.exit_codes:
        return ""
    exception = exception_of(rank_log)
    if exception:
        return exception
    logs = (attempt.folder.log(attempt.number, rank) for rank in dict.fromkeys((end.rank or 0, 0)))
    errors = next(filter(None, map(_error_lines, logs)), [])
    return errors[-1].removeprefix("error: ") if errors else ""


def _with_container_failure(attempt: Attempt, end: AttemptEnd, log: str) -> AttemptEnd | None:
    """Return the end with the failure that the container runtime reports in its log; None if it reports none."""
    container = attempt.stage.container
    failed = container_failure_of(log) if container is not None else None
    if container is None or failed is None:
        return None
    failure, line = failed
    remedy = advice(failure, node_runtime(container), container.image)
    reason = f"{failure.kind}: {line}; {remedy}"
    return replace(end, kind=failure.kind, reason=reason, restart=failure.restart, avoid_host=failure.avoid_host)
