"""``amlaunch wait``: until a run has ended; the exit code says how."""

from __future__ import annotations

import argparse
import time

from amlaunch.launcher.commands._shared import add_json, add_run
from amlaunch.launcher.commands.status import advice, goes_on, is_lost, rest
from amlaunch.launcher.display import wording
from amlaunch.launcher.display.live_report import make_report
from amlaunch.launcher.display.summary import closing, exit_code, headline
from amlaunch.launcher.runs.element_state import ElementState, is_driven, overall, read_run
from amlaunch.launcher.runs.find import find_run, read_plan, roots
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.slurm.queue import Queue
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.run_layout import RunDir

FILE_SECONDS = 1.0
"""Between two looks at the run's files; Slurm is asked no more often than its answers are kept (amlaunch.launcher.slurm.queue)."""
LOST_SECONDS = 60.0
"""How long a submit may take to write down the number of its job; whoever has not by then was interrupted."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch wait``."""
    add_run(parser)
    add_json(parser, "print the run as JSON on stdout once it has ended")


def run(options: argparse.Namespace) -> int:
    """Wait for one run; Ctrl-C leaves the run alone."""
    run_dir = find_run(roots(options.runs), options.run)
    return wait_for(run_dir, read_plan(run_dir), options)


def wait_for(run_dir: RunDir, plan: Plan, options: argparse.Namespace) -> int:
    """Show what happens until nothing of the run goes on by itself any more."""
    alive = time.monotonic()
    report = make_report(options.json, done_note="already done")
    with report:
        while True:
            looked = time.monotonic()
            queue = Queue()
            states = read_run(run_dir, plan, queue)
            report(states)
            if not goes_on(run_dir, states):
                break
            if not _only_lost(run_dir, states, queue):
                alive = looked
            elif looked - alive > LOST_SECONDS:
                break  # it would never return: only another submit finds out
            time.sleep(rest(time.monotonic() - looked, FILE_SECONDS))
    if options.json:
        print(wording.to_json(wording.as_json(run_dir, plan, states, overall(states))))
        return exit_code(states)
    done = all(state.state == State.DONE for state in states)
    for line in (
        closing(run_dir, plan, states)
        if done
        else ["", headline(run_dir, plan, states), *advice(run_dir, plan, states)]
    ):
        report.say(line)
    return exit_code(states)


def _only_lost(run_dir: RunDir, states: list[ElementState], queue: Queue) -> bool:
    """Whether nothing else goes on than submissions that sbatch never answered, and Slurm itself answers."""
    unknown = [state for state in states if state.state == State.UNKNOWN]
    return not is_driven(run_dir, states) and all(is_lost(state) for state in unknown) and queue.jobs is not None
