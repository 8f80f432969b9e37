"""Follow a run: decide whether anything of it is active, pace the polling, and wait until it has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from amlaunch.launcher.display import wording
from amlaunch.launcher.display.advice import advice, is_lost
from amlaunch.launcher.runs.element_state import ElementState, is_driven, overall_state, read_run
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.run_layout import RunDir

# Runs that were never on a cluster need no Slurm.
if TYPE_CHECKING:
    from amlaunch.launcher.slurm.queue import Queue

MAX_POLLING_SHARE = 0.1
"""Largest share of its time that a command spends polling, however many elements there are."""
MAX_PAUSE_SECONDS = 60.0
"""Longest pause between two polls, however slowly Slurm answers."""
POLL_SECONDS = 1.0
"""Shortest pause between two reads of the run's files; Slurm's answers are cached (amlaunch.launcher.slurm.queue)."""
LOST_SECONDS = 60.0
"""Time for a submit to record its job ID; after that it was interrupted."""


def may_be_active(run_dir: RunDir, states: Sequence[ElementState]) -> bool:
    """Return True if anything of the run is active, or if an element's state is unknown."""
    return is_driven(run_dir, states) or any(state.state == State.UNKNOWN for state in states)


def pause_seconds(polling_seconds: float, min_seconds: float) -> float:
    """Return the pause before the next poll, from the duration of the last one."""
    return min(max(min_seconds, polling_seconds / MAX_POLLING_SHARE), MAX_PAUSE_SECONDS)


def wait_until_ended(run_dir: RunDir, plan: Plan, *, json: bool) -> int:
    """Show progress until the run has ended, then its summary; return the exit code."""
    from amlaunch.launcher.display.live_report import make_report
    from amlaunch.launcher.display.summary import closing_lines, exit_code, headline

    report = make_report(json, "already done")
    with report:
        states = _poll_until_ended(run_dir, plan, report)

    if json:
        print(wording.to_json(wording.as_json(run_dir, plan, states, overall_state(states))))
    elif all(state.state == State.DONE for state in states):
        for line in closing_lines(run_dir, plan, states):
            report.say(line)
    else:
        for line in ["", headline(run_dir, plan, states), *advice(run_dir, plan, states)]:
            report.say(line)
    return exit_code(states)


def _poll_until_ended(
    run_dir: RunDir, plan: Plan, report: Callable[[Sequence[ElementState]], None]
) -> list[ElementState]:
    """Report the states until nothing of the run is active; return the last ones."""
    from amlaunch.launcher.slurm.queue import Queue

    last_active = time.monotonic()
    while True:
        started = time.monotonic()
        queue = Queue()
        states = read_run(run_dir, plan, queue)
        report(states)
        if not may_be_active(run_dir, states):
            return states
        if not _only_lost(run_dir, states, queue):
            last_active = started
        elif started - last_active > LOST_SECONDS:
            # The job ID will never be recorded: only another submit finds the job.
            return states
        time.sleep(pause_seconds(time.monotonic() - started, POLL_SECONDS))


def _only_lost(run_dir: RunDir, states: Sequence[ElementState], queue: Queue) -> bool:
    """Return True if Slurm answers, and only submissions without a job ID keep the run from having ended."""
    unknown = [state for state in states if state.state == State.UNKNOWN]
    return not is_driven(run_dir, states) and all(is_lost(state) for state in unknown) and queue.jobs is not None
