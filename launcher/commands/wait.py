"""``amlaunch wait``: until a run has ended; the exit code says how."""

from __future__ import annotations

import argparse
import time

from launcher import describe
from launcher.commands.status import advice
from launcher.plan import Plan
from launcher.queue import Queue
from launcher.report import make_report
from launcher.state import DONE, UNKNOWN, is_driven, overall, read_run
from launcher.store import find_run, read_plan, roots
from launcher.summary import closing, exit_code
from recipes.rundir import RunDir

FILE_SECONDS = 1.0
"""Between two looks at the run's files; Slurm is asked no more often than its answers are kept (launcher.queue)."""
BUSY_PART = 0.1
"""At most so much of the time is spent looking, however many elements there are."""


def run(options: argparse.Namespace) -> int:
    """Wait for one run; Ctrl-C leaves the run alone."""
    run_dir = find_run(roots(options.runs), options.run)
    return wait_for(run_dir, read_plan(run_dir), options)


def wait_for(run_dir: RunDir, plan: Plan, options: argparse.Namespace) -> int:
    """Show what happens until nothing of the run goes on by itself any more."""
    began = time.monotonic()
    report = make_report(options.json, done_before="already done")
    with report:
        while True:
            looked = time.monotonic()
            states = read_run(run_dir, plan, Queue())
            report(states)
            if not is_driven(run_dir, states) and not any(state.state == UNKNOWN for state in states):
                break
            time.sleep(max(FILE_SECONDS, (time.monotonic() - looked) / BUSY_PART))
    if options.json:
        print(describe.to_json(describe.as_json(run_dir, plan, states, overall(states))))
        return exit_code(states)
    done = all(state.state == DONE for state in states)
    for line in closing(run_dir, plan, states, time.monotonic() - began) if done else advice(run_dir, plan, states):
        report.say(line)
    return exit_code(states)
