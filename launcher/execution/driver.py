"""Run one element on its host: start its ranks, forward the request to stop, wait, and record how the attempt ended.

submitit starts this on the local machine, and :mod:`amlaunch.launcher.execution.slurm_job` runs it in a Slurm job. The
driver knows processes and files, and nothing of what the stage computes.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from amlaunch.containers.node_setup import verdict_of
from amlaunch.containers.runtimes.catalog import CannotLaunch
from amlaunch.launcher.execution.attempt import Assignment, Attempt
from amlaunch.launcher.execution.attempt_end import (
    classify,
    hang_end,
    node_name,
    overdue_end,
    refused_end,
    stopped_before_start,
    with_cause,
    with_error_message,
)
from amlaunch.launcher.execution.attempt_limit import limit_attempts
from amlaunch.launcher.execution.rank_processes import LocalRanks
from amlaunch.launcher.execution.rank_wait import Processes, RanksEnd, RankWatch, first_failed_rank, wait_for
from amlaunch.launcher.execution.rendezvous import free_ports
from amlaunch.launcher.execution.stop_request import StopRequest
from amlaunch.launcher.runs.attempt_record import AttemptEnd, AttemptHistory, AttemptStart
from amlaunch.launcher.runs.element_files import is_done
from amlaunch.launcher.runs.failure_causes import TAIL_BYTES
from amlaunch.launcher.runs.find import read_plan
from amlaunch.launcher.runs.states import Outcome
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.files import Lock, read_object, write_json
from amlaunch.recipes.format.placeholders import UnsetVariable
from amlaunch.recipes.run_layout import RunDir

PORT_TAKEN = ("EADDRINUSE", "address already in use")
"""Messages of rank 0 if another process has taken the port of the rendezvous."""


class RankStarter(Protocol):
    """Starts the ranks of an attempt: as processes of this host, or as one step of a Slurm job."""

    def start(self, attempt: Attempt, files: ExitStack, port: int) -> Processes:
        """Start the ranks, which meet at ``port``."""

    def check_nodes(self, attempt: Attempt, files: ExitStack) -> Processes:
        """Start the check of the nodes that comes before containers; empty if there is nothing to check."""

    def own_codes(self, attempt: Attempt, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the exit codes without those of ranks that their starter ended."""

    def explain(self, attempt: Attempt, end: AttemptEnd) -> AttemptEnd:
        """Complete how the ranks ended by what only their starter knows."""


def run_element(
    run_root: str,
    stage_name: str,
    element_name: str,
    assignment: Assignment,
    starter: RankStarter | None = None,
    early_signals: Sequence[int] = (),
    plan: Plan | None = None,
) -> Outcome:
    """Make one attempt; its outcome is also the last line of ``attempts.jsonl``.

    An element that another driver holds is left alone (``Outcome.LOCKED``). ``early_signals``: signals received before
    this call; ``plan``: replaces the run's ``plan.json``.
    """
    run = RunDir(Path(run_root))
    plan = plan or read_plan(run)
    stage = plan.stage(stage_name)
    element = next(element for element in stage.elements if element.name == element_name)
    folder = run.element(stage_name, element_name)
    lock = Lock(folder.lock)
    if not _acquire(lock, assignment.lock_seconds):
        return Outcome.LOCKED
    # Finished between the launcher's look and ours.
    if is_done(folder):
        return Outcome.DONE

    launcher_lock = Path(assignment.launcher_lock) if assignment.launcher_lock else None
    stop = StopRequest(folder, launcher_lock, assignment.grace_seconds, assignment.job_end)
    for leftover in (folder.stop, folder.result, folder.done):
        leftover.unlink(missing_ok=True)
    for signal_number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(signal_number, stop.set)
    if early_signals:
        stop.set(early_signals[0])

    number = AttemptHistory.read(folder.attempts).next_number
    attempt = Attempt(run, plan, stage, element, assignment, lock, number)
    return run_attempt(attempt, stop, starter or LocalRanks())


def _acquire(lock: Lock, timeout: float) -> bool:
    """Take an element's lock; on a network file system a crashed host's lock may live on for minutes."""
    deadline = time.monotonic() + timeout
    while not lock.acquire():
        if time.monotonic() >= deadline:
            return False
        time.sleep(1.0)
    return True


def run_attempt(attempt: Attempt, stop: StopRequest, starter: RankStarter) -> Outcome:
    """Start the ranks, wait for them, and record how the attempt ended and whether it is restarted automatically."""
    started = time.monotonic()
    attempt.record(_start_line(attempt))
    end = _run(attempt, stop, starter)
    end = replace(end, attempt=attempt.number, seconds=round(time.monotonic() - started, 3))
    if end.outcome == Outcome.DONE:
        marker = {"time": time.time(), "attempt": end.attempt, "seconds": end.seconds}
        write_json(attempt.folder.done, {**marker, **read_object(attempt.folder.result)})
    is_certain = _restart_is_certain(attempt, end, stop)
    end = limit_attempts(attempt.history, end, attempt.saved_progress, restart_is_certain=is_certain)
    attempt.record(replace(end, time=time.time()))
    return end.outcome


def _restart_is_certain(attempt: Attempt, end: AttemptEnd, stop: StopRequest) -> bool:
    """Return False if a launcher on this machine may be stopping: then it restarts nothing.

    A signal to the process group, or a shutdown, reaches launcher, driver and ranks in any order.
    """
    is_local = attempt.assignment.launcher_lock is not None
    return not (is_local and (stop.is_set or end.outcome == Outcome.STOPPED))


def _start_line(attempt: Attempt) -> AttemptStart:
    assignment = attempt.assignment
    return AttemptStart(
        attempt.number,
        host=node_name(),
        pid=os.getpid(),
        job=assignment.job or os.environ.get("SUBMITIT_LOCAL_JOB_ID", ""),
        budget=assignment.budget,
        done=attempt.saved_progress,
        gpus=assignment.total_gpus,
        nodes=assignment.nodes,
        restarts=assignment.restarts,
    )


def _run(attempt: Attempt, stop: StopRequest, starter: RankStarter) -> AttemptEnd:
    """Check the nodes, start the ranks, wait for them, and return how they ended."""
    try:
        refusal = _check_nodes(attempt, stop, starter)
        if refusal is not None:
            return refusal
        ranks = _wait_for_ranks(attempt, stop, starter)
    except (OSError, ValueError, UnsetVariable) as error:
        # No such program, a full disk, a variable that is not set.
        return _not_started(error)
    return _explain(attempt, stop, starter, ranks)


def _not_started(error: Exception) -> AttemptEnd:
    problem = (
        f"the variable {error.name} is not set (container.env); export it"
        if isinstance(error, UnsetVariable)
        else str(error)
    )
    reason = f"could not start the ranks: {problem}"
    return AttemptEnd(Outcome.FAILED, reason, retryable=not isinstance(error, CannotLaunch))


def _check_nodes(attempt: Attempt, stop: StopRequest, starter: RankStarter) -> AttemptEnd | None:
    """Return the end of an attempt whose nodes cannot start containers, or that is stopped during the check.

    Fetching an image to a node may take minutes; a request to stop ends it.
    """
    verdicts = attempt.folder.verdicts
    shutil.rmtree(verdicts, ignore_errors=True)
    with ExitStack() as files:
        if attempt.stage.container is not None:
            verdicts.mkdir()
        checks = starter.check_nodes(attempt, files)
        codes = wait_for(checks, stop).codes
    if stop.is_set and checks:
        return AttemptEnd(Outcome.STOPPED, stop.reason, restart=stop.came_by_signal)
    if not any(codes):
        return None
    without_verdict = {
        "reason": f"the node check failed before any container started (exit code {codes[0]})",
        "again": True,
    }
    return refused_end(verdict_of(verdicts) or without_verdict, codes)


def _explain(attempt: Attempt, stop: StopRequest, starter: RankStarter, ranks: RanksEnd) -> AttemptEnd:
    """Return how the ranks ended and why."""
    if any(ranks.codes) and attempt.folder.stop.exists():
        # The ranks may have seen the file before the driver did.
        stop.set()
    codes = starter.own_codes(attempt, ranks.codes)
    if codes != ranks.codes:
        ranks = RanksEnd(codes, first_failed_rank(codes), ranks.hung)
    result = read_object(attempt.folder.result) or None
    end = replace(classify(ranks, result, stop if stop.is_set else None), exit_codes=ranks.codes)
    unstarted = stopped_before_start(attempt, end, stop) if end.outcome == Outcome.FAILED and stop.is_set else None
    if unstarted is not None:
        return replace(unstarted, exit_codes=ranks.codes)
    if ranks.hung:
        end = hang_end(attempt, end)
    elif end.outcome == Outcome.FAILED and stop.is_overdue:
        end = overdue_end(end, stop)
    end = with_cause(attempt, with_error_message(attempt, starter.explain(attempt, end)))
    return replace(end, exit_codes=ranks.codes)


def _wait_for_ranks(attempt: Attempt, stop: StopRequest, starter: RankStarter) -> RanksEnd:
    """Start the ranks and wait for them; if the port of their rendezvous turns out to be taken, try another."""
    for port in free_ports(attempt.assignment.port_seed or os.getpid()):
        log_size = _size(attempt.log(0))
        with ExitStack() as files:
            ranks = wait_for(starter.start(attempt, files, port), stop, RankWatch(attempt))
        if not any(ranks.codes) or stop.is_set or not _contains(attempt.log(0), log_size, PORT_TAKEN):
            break
    return ranks


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _contains(log: Path, offset: int, messages: tuple[str, ...]) -> bool:
    """Return True if the log contains a message after ``offset``; only its last 64 KB are read."""
    if not log.exists():
        return False
    with open(log, "rb") as handle:
        handle.seek(max(offset, _size(log) - TAIL_BYTES))
        text = handle.read().decode(errors="replace")
    return any(message in text for message in messages)
