"""``amlaunch local``: carry out a recipe on this machine, and say how it went."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from amlaunch.launcher.checks.containers import check_containers
from amlaunch.launcher.commands._shared import add_new_run, sweep_overrides
from amlaunch.launcher.commands.status import advice
from amlaunch.launcher.display import wording
from amlaunch.launcher.display.live_report import LiveReport, PlainReport, make_report
from amlaunch.launcher.display.summary import closing, exit_code, headline, stage_closing
from amlaunch.launcher.execution.local_executor import LocalExecutor
from amlaunch.launcher.planning.resolve import check_here, check_inside, default_recipe, notes, prepare
from amlaunch.launcher.runs.element_state import ElementState, overall, read_run, read_stage
from amlaunch.launcher.runs.find import run_dir_of
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.runs.submissions import submissions_of
from amlaunch.launcher.specs.machine import Machine
from amlaunch.launcher.specs.plan import Plan, Stage
from amlaunch.launcher.submission.run_writer import write_run
from amlaunch.launcher.submission.slurm_submission import known_states
from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.files import Lock
from amlaunch.recipes.run_layout import RunDir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch local``."""
    add_new_run(parser)


def run(options: argparse.Namespace) -> int:
    """Run all stages that are not done; exit code as in ``amlaunch --help``."""
    options.overrides += sweep_overrides(options.sweep)
    loaded, plan, machine = prepare(options, starting=True)
    run_dir = run_dir_of(options, plan)
    stages = [plan.stage(options.stage)] if options.stage else plan.stages
    _check_input(run_dir, plan, stages)
    check_here(loaded, stages)
    remarks = [*check_containers(loaded, plan, run_dir, None), *check_inside(loaded, plan, run_dir, stages)]
    _check_jobs(run_dir, plan)
    with driving(run_dir):
        report = make_report(options.json)
        if not options.recipe:
            report.say(f"no recipe given: this is {default_recipe(options.gpus)}; amlaunch recipes lists the others")
        for note in [*notes(loaded, plan, machine), *remarks]:
            report.say(f"note: {note}")
        busy = any(state.state == State.RUNNING for state in read_run(run_dir, plan))
        write_run(run_dir, loaded, plan, options.argv, refresh_code=not busy)
        return carry_out(options, report, plan, machine, run_dir, stages)


@contextmanager
def driving(run_dir: RunDir) -> Iterator[None]:
    """Hold the run's lock. Raises BadInput where another process does, or none can."""
    lock = Lock(run_dir.lock)
    if not _acquire(lock, run_dir):
        raise BadInput(
            f"{run_dir.root.name} is being run by another amlaunch; follow it with {wording.program()} logs {wording.name_of(run_dir)} -f"
        )
    try:
        run_dir.stop.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def _check_jobs(run_dir: RunDir, plan: Plan) -> None:
    """A run that a cluster works on is not started here too. Raises BadInput, and SlurmError where the cluster does not say."""
    if not any(submissions_of(run_dir, plan).values()):
        return
    jobs = [
        state.job for state in known_states(run_dir, plan) if state.job and state.state in (State.RUNNING, State.QUEUED)
    ]
    if jobs:
        name = wording.name_of(run_dir)
        raise BadInput(
            f"{plan.run_id} is on a cluster (job {jobs[0]}{', …' if len(jobs) > 1 else ''}); {wording.program()} wait {name} waits for it, cancel {name} ends it"
        )


def _acquire(lock: Lock, run_dir: RunDir) -> bool:
    try:
        return lock.acquire()
    except OSError as error:
        raise BadInput(f"{run_dir.root}: cannot be written: {error.strerror}; --runs DIR puts runs elsewhere") from None


def carry_out(
    options: argparse.Namespace,
    report: PlainReport | LiveReport,
    plan: Plan,
    machine: Machine,
    run_dir: RunDir,
    stages: list[Stage],
) -> int:
    """Run what is not done of ``stages``, as the run directory has it, and tell; the exit code."""
    report.say(f"{plan.run_id}: {run_dir.root}")
    with report:
        executor = LocalExecutor(run_dir, plan, machine, report)
        with _stopping_on_signals(executor, report):
            done = executor.execute(stages)
    states = [state for stage in stages for state in read_stage(run_dir, stage)]
    if options.json:
        everything = read_run(run_dir, plan)
        print(wording.to_json(wording.as_json(run_dir, plan, everything, overall(everything))))
    _tell(run_dir, plan, states, done, report)
    return OK if done else exit_code(states)


def _check_input(run_dir: RunDir, plan: Plan, stages: list[Stage]) -> None:
    """A single stage needs what the stages before it make."""
    chosen = {stage.name for stage in stages}
    for stage in stages:
        for before in stage.after:
            if before not in chosen and any(
                state.state != State.DONE for state in read_stage(run_dir, plan.stage(before))
            ):
                raise BadInput(
                    f"stage {stage.name} needs stage {before}, which is not done; leave out --stage {stage.name}, or run --stage {before} first"
                )


def _tell(
    run_dir: RunDir, plan: Plan, states: list[ElementState], done: bool, report: PlainReport | LiveReport
) -> None:
    if done:
        partly = len(states) < len(read_run(run_dir, plan))
        for line in stage_closing(run_dir, states) if partly else closing(run_dir, plan, states):
            report.say(line)
        return
    report.say("\n" + headline(run_dir, plan, states))
    for block in advice(run_dir, plan, states):
        report.say("\n" + block)


@contextmanager
def _stopping_on_signals(executor: LocalExecutor, report: PlainReport | LiveReport) -> Iterator[None]:
    """The first Ctrl-C saves and stops, the second ends at once."""

    def handle(number: int, _: FrameType | None) -> None:
        if executor.stopping:
            executor.kill()
            report.say("ended at once; the same command goes on from what was saved last")
            sys.exit(128 + number)
        report.say("saving, then stopping (Ctrl-C again ends at once)")
        executor.stop()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
