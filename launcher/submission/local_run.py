"""Run a plan on this machine, and report how it went."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from amlaunch.launcher.display import wording
from amlaunch.launcher.display.advice import advice
from amlaunch.launcher.display.live_report import LiveReport, PlainReport, make_report
from amlaunch.launcher.display.summary import closing_lines, exit_code, headline, stage_closing_lines
from amlaunch.launcher.execution.local_executor import LocalExecutor
from amlaunch.launcher.planning.run_request import RunRequest
from amlaunch.launcher.planning.run_sources import ResolvedRun, StartKind
from amlaunch.launcher.runs.element_state import ElementState, overall_state, read_run, read_stage
from amlaunch.launcher.runs.states import ACTIVE_STATES, State
from amlaunch.launcher.specs.machine import this_machine
from amlaunch.launcher.submission.preflight import already_running, check_inputs
from amlaunch.launcher.submission.run_writer import write_start
from amlaunch.launcher.submission.slurm_submission import known_states
from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.files import Lock
from amlaunch.recipes.run_layout import RunDir

Report = PlainReport | LiveReport


def run_locally(run: ResolvedRun, notes: Sequence[str], request: RunRequest) -> int:
    """Run the stages of a run that are not done; return the exit code.

    Raises BadInput if the run is active elsewhere, and SlurmError if Slurm cannot tell.
    """
    check_inputs(run, read_run(run.run_dir, run.plan), [State.DONE])
    _check_idle(run)
    with driving(run.run_dir):
        report = make_report(request.json)
        for line in wording.note_lines(notes, verbose=request.verbose):
            report.say(line)
        write_start(run, request.argv, read_run(run.run_dir, run.plan), report.say)
        return _execute(run, report, json=request.json)


def _check_idle(run: ResolvedRun) -> None:
    """Raise BadInput if jobs of the run are active on a cluster, or if it is to be changed while it runs."""
    name, program = wording.name_of(run.run_dir), wording.program()
    active = [state for state in known_states(run.run_dir, run.plan) if state.state in ACTIVE_STATES]
    jobs = [state.job for state in active if state.job]
    if jobs:
        more = f" and {len(jobs) - 1} more" if jobs[1:] else ""
        raise BadInput(
            f"{run.plan.run_id} is active on a cluster (job {jobs[0]}{more}); wait for it with {program} wait {name}, "
            f"or stop it with {program} cancel {name}"
        )
    if active and run.kind is StartKind.RESUME:
        raise BadInput(f"{run.plan.run_id} is running; stop it first: {program} cancel {name} --checkpoint")


@contextmanager
def driving(run_dir: RunDir) -> Iterator[None]:
    """Hold the run's lock. Raises BadInput if another process holds it, or if it cannot be created."""
    lock = Lock(run_dir.lock)
    try:
        acquired = lock.acquire()
    except OSError as error:
        raise BadInput(
            f"{run_dir.root}: not writable: {error.strerror}; choose another folder with --runs DIR"
        ) from None
    if not acquired:
        raise already_running(run_dir)
    try:
        run_dir.stop.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _execute(run: ResolvedRun, report: Report, *, json: bool) -> int:
    """Run the stages, report the result, and return the exit code."""
    report.say(f"{run.plan.run_id}: {run.run_dir.root}")
    with report:
        executor = LocalExecutor(run.run_dir, run.plan, this_machine(), report)
        with stopping_on_signals(executor, report):
            done = executor.execute(list(run.stages))

    states = [state for stage in run.stages for state in read_stage(run.run_dir, stage)]
    everything = read_run(run.run_dir, run.plan)
    if json:
        print(wording.to_json(wording.as_json(run.run_dir, run.plan, everything, overall_state(everything))))
    for line in _summary(run, states, done=done, is_partial=len(states) < len(everything)):
        report.say(line)
    return OK if done else exit_code(states)


def _summary(run: ResolvedRun, states: list[ElementState], *, done: bool, is_partial: bool) -> list[str]:
    if not done:
        blocks = [headline(run.run_dir, run.plan, states), *advice(run.run_dir, run.plan, states)]
        return [f"\n{block}" for block in blocks]
    return stage_closing_lines(run.run_dir, states) if is_partial else closing_lines(run.run_dir, run.plan, states)


@contextmanager
def stopping_on_signals(executor: LocalExecutor, report: Report) -> Iterator[None]:
    """On the first Ctrl-C save and stop, on the second end at once."""

    def handle(number: int, _: FrameType | None) -> None:
        if executor.stopping:
            executor.kill()
            report.say("ended at once; run the same command again to continue from the last checkpoint")
            sys.exit(128 + number)
        report.say(f"{wording.stopping_text([executor.stage])} (press Ctrl-C again to end at once)")
        executor.stop()

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    previous = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
