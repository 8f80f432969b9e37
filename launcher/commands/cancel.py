"""``amlaunch cancel``: end what runs and what waits; with ``--checkpoint`` what runs saves first."""

from __future__ import annotations

import argparse
import os
import signal
import time
from contextlib import suppress

from launcher import describe
from launcher import queue as queue_module
from launcher.plan import Plan
from launcher.queue import Queue
from launcher.slurm import scancel
from launcher.state import ACTIVE, QUEUED, RUNNING, ElementState, read_run
from launcher.store import find_run, read_plan, roots
from launcher.submissions import submissions_of
from recipes.errors import FAILED, OK
from recipes.files import is_locked, read_json_lines
from recipes.rundir import RunDir

SAVE_SECONDS = 300.0
"""How long ranks may take to save before we stop waiting for the word that they have."""


def run(options: argparse.Namespace) -> int:
    """Exit code 0 once nothing of the run goes on (with ``--checkpoint``), or once Slurm was told."""
    run_dir = find_run(roots(options.runs), options.run)
    plan = read_plan(run_dir)
    active = [state for state in read_run(run_dir, plan, Queue(max_age=0)) if state.state in ACTIVE]
    mine = _own_jobs(run_dir, plan)
    jobs = [state for state in active if state.job in mine]
    local = [state for state in active if not state.job]
    if not jobs and not local and not is_locked(run_dir.lock):
        print(f"{plan.run_id}: nothing of it runs or waits")
        return OK
    queued = [state.job for state in jobs if state.state == QUEUED or not options.checkpoint]
    if queued:
        scancel(_together(queued, run_dir, plan))
        print(f"cancelled {len(queued)} job{'s' * (len(queued) > 1)}", flush=True)
    queue_module.forget()
    if local:
        _end_here(run_dir, plan, local, save=options.checkpoint)
    if options.checkpoint:
        return _wait_until_saved(run_dir, plan, [state for state in jobs if state.state == RUNNING] + local)
    print(f"next: {describe.program()} status {describe.name_of(run_dir)}; {describe.program()} retry {describe.name_of(run_dir)} goes on from the last checkpoint")
    return OK


def _own_jobs(run_dir: RunDir, plan: Plan) -> set[str]:
    """The jobs that this run submitted; those of another run, whose shards it shares, are not ours to end."""
    own = str(run_dir.root)
    return {job for submissions in submissions_of(run_dir, plan).values() for one in submissions if one.run == own for job in one.tasks().values()}


def _together(jobs: list[str], run_dir: RunDir, plan: Plan) -> list[str]:
    """Whole arrays by their own number: 10,000 elements are not 10,000 arguments."""
    wanted, found = set(jobs), []
    for submissions in submissions_of(run_dir, plan).values():
        for one in submissions:
            tasks = [job for job in one.tasks().values() if job in wanted]
            found += [one.job or ""] if len(tasks) == len(one.elements) else tasks
    return found


def _end_here(run_dir: RunDir, plan: Plan, states: list[ElementState], *, save: bool) -> None:
    """On this machine: ask each driver to save and leave, or end it; its launcher ends with it."""
    for state in states:
        folder = run_dir.element(state.stage, state.name)
        if save:
            folder.stop.touch()
            continue
        starts = [line for line in read_json_lines(folder.attempts) if line.get("event") == "start"]
        if starts and is_locked(folder.lock):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(starts[-1]["pid"], signal.SIGKILL)


def _wait_until_saved(run_dir: RunDir, plan: Plan, running: list[ElementState]) -> int:
    """Until the ranks have saved and left; asked again and again, for one that was just starting did not hear it."""
    waiting = {(state.stage, state.name) for state in running}
    deadline = time.monotonic() + SAVE_SECONDS
    if waiting:
        print(f"{len(waiting)} running element{'s' * (len(waiting) > 1)}: saving, then leaving", flush=True)
    while waiting and time.monotonic() < deadline:
        for stage, name in waiting:
            run_dir.element(stage, name).stop.touch()
        time.sleep(1.0)
        states = {(state.stage, state.name): state for state in read_run(run_dir, plan, Queue(max_age=2.0))}
        for key in sorted(waiting):
            if states[key].state != RUNNING:
                print(describe.line(states[key]), flush=True)
                waiting.discard(key)
    if waiting:
        print(f"still saving after {SAVE_SECONDS:.0f} s: {', '.join(' '.join(key) for key in sorted(waiting))}; they leave as soon as they have")
        return FAILED
    print(f"next: {describe.program()} retry {describe.name_of(run_dir)} goes on from what was saved")
    return OK
