"""``amlaunch cancel``: cancel the running and pending elements of a run; with ``--checkpoint`` they save first."""

from __future__ import annotations

import argparse
import platform
import signal
import time
from collections.abc import Sequence

from amlaunch.launcher.commands._shared import add_run_argument, own_states, raise_if_unknown
from amlaunch.launcher.display import wording
from amlaunch.launcher.errors import SlurmError
from amlaunch.launcher.runs.element_state import ElementState, read_run
from amlaunch.launcher.runs.find import find_run, read_plan, roots
from amlaunch.launcher.runs.states import ACTIVE_STATES, State
from amlaunch.launcher.runs.submissions import submissions_of
from amlaunch.launcher.slurm import queue as queue_module
from amlaunch.launcher.slurm.client import scancel
from amlaunch.launcher.slurm.queue import Queue
from amlaunch.launcher.specs.plan import Plan
from amlaunch.launcher.submission.slurm_submission import recover, submitting
from amlaunch.recipes.errors import FAILED, OK
from amlaunch.recipes.files import is_locked, read_object, signal_lock_holders
from amlaunch.recipes.output import counted
from amlaunch.recipes.run_layout import ElementDir, RunDir

MAX_SAVE_SECONDS = 300.0
"""Time for the ranks to save before ``--checkpoint`` stops waiting."""
POLL_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch cancel``."""
    add_run_argument(parser)
    parser.add_argument(
        "--checkpoint", action="store_true", help="let running elements save a checkpoint first, and wait for them"
    )


def run(options: argparse.Namespace) -> int:
    """Cancel a run; with ``--checkpoint`` return once nothing of it is active."""
    run_dir = find_run(roots(options.runs), options.run)
    # A submit in progress could add stages after the states were read; the plan is read again once it has finished.
    with submitting(run_dir, read_plan(run_dir)):
        plan = read_plan(run_dir)
        _recover(run_dir, plan)
        states = read_run(run_dir, plan, Queue(max_age=0))
        states_of_run = own_states(run_dir, plan, states)
        raise_if_unknown(states_of_run, "cancel", "nothing was cancelled; try again once Slurm answers")

        active = [state for state in states_of_run if state.state in ACTIVE_STATES]
        if not active and not is_locked(run_dir.lock):
            is_shared = any(state.state in ACTIVE_STATES for state in states)
            others = " (another run is making the shards that both use)" if is_shared else ""
            print(f"{plan.run_id} has no running or pending jobs{others}")
            return OK
        cancelled = [state for state in active if state.state == State.QUEUED or not options.checkpoint]
        _cancel_jobs([state.job for state in cancelled if state.job], run_dir, plan)

    _stop_launcher(run_dir)
    _stop_processes(run_dir, [state for state in active if not state.job], save=options.checkpoint)
    if options.checkpoint:
        return _wait_until_saved(run_dir, plan)
    name, program = wording.name_of(run_dir), wording.program()
    has_saved = any(state.has_saved for state in states_of_run)
    again = "continue from the last checkpoint" if has_saved else "start it again"
    print(f"next: {program} status {name}, or {again}: {program} retry {name}")
    return OK


def _recover(run_dir: RunDir, plan: Plan) -> None:
    """Find the jobs whose IDs an interrupted submit did not record, to cancel them, too. Raises SlurmError."""
    try:
        recover(run_dir, plan, lambda text: print(text, flush=True))
    except SlurmError as error:
        raise SlurmError(
            error.command,
            f"{error.message}; a submit was interrupted, and its jobs may be running: nothing was cancelled; "
            "try again once Slurm answers",
        ) from None


# --- jobs on a cluster


def _cancel_jobs(jobs: Sequence[str], run_dir: RunDir, plan: Plan) -> None:
    if jobs:
        scancel(_merge_arrays(jobs, run_dir, plan))
        print(f"cancelled {counted(len(jobs), 'job')}", flush=True)
        queue_module.invalidate_cache()


def _merge_arrays(jobs: Sequence[str], run_dir: RunDir, plan: Plan) -> list[str]:
    """Replace the jobs of a complete array with the array's own ID: 10,000 elements are too many arguments."""
    remaining = set(jobs)
    job_ids: list[str] = []
    for submissions in submissions_of(run_dir, plan).values():
        for submission in submissions:
            tasks = [job for job in submission.tasks().values() if job in remaining]
            job_ids += [submission.job or ""] if len(tasks) == len(submission.elements) else tasks
    return job_ids


# --- processes


def _stop_launcher(run_dir: RunDir) -> None:
    """Keep amlaunch local from starting anything else: by a signal, or from another machine by a file."""
    # To amlaunch local, SIGTERM is Ctrl-C.
    if signal_lock_holders(run_dir.lock, signal.SIGTERM) or not is_locked(run_dir.lock):
        return
    run_dir.stop.touch()
    host, name, program = launcher_host(run_dir), wording.name_of(run_dir), wording.program()
    print(
        f"amlaunch local is running {run_dir.root.name} on {host}, where signals from here do not reach it: "
        "asked it to save and stop, which takes a few seconds"
    )
    print(
        f"if {program} status {name} still shows it running after that, press Ctrl-C where it was started on {host}, "
        f"or run amlaunch cancel {name} there",
        flush=True,
    )


def launcher_host(run_dir: RunDir) -> str:
    """Return the host on which amlaunch local was started, for messages."""
    host = str(read_object(run_dir.provenance).get("host") or "another machine")
    return f"{host} (this machine, by another user)" if host == platform.node() else host


def _stop_processes(run_dir: RunDir, states: Sequence[ElementState], *, save: bool) -> None:
    """Ask the processes of elements to ``save`` and stop, or kill them."""
    killed = 0
    for state in states:
        folder = run_dir.element(state.stage, state.name)
        if not save and signal_lock_holders(folder.lock, signal.SIGKILL):
            killed += 1
            continue
        _request_stop(folder)
        if not save:
            print(
                f"{state.stage} {state.name} is running on {state.host or 'another machine'}, where signals from here "
                "do not reach it: asked it to save and stop"
            )
    if killed:
        print(f"killed {counted(killed, 'element')} on this machine", flush=True)


def _request_stop(folder: ElementDir) -> None:
    # The job may have started without its driver.
    folder.root.mkdir(parents=True, exist_ok=True)
    folder.stop.touch()


# --- with --checkpoint


def _wait_until_saved(run_dir: RunDir, plan: Plan) -> int:
    """Wait until nothing of the run is active; elements that have only just started are asked again."""
    saving: set[tuple[str, str]] = set()
    deadline = time.monotonic() + MAX_SAVE_SECONDS
    while True:
        states_of_run = own_states(run_dir, plan, read_run(run_dir, plan, Queue(max_age=2.0)))
        states = {(state.stage, state.name): state for state in states_of_run}
        active = {key: state for key, state in states.items() if state.state in (*ACTIVE_STATES, State.UNKNOWN)}
        running = {key for key, state in active.items() if state.state == State.RUNNING}
        for key in sorted(saving - active.keys()):
            print(wording.status_line(states[key]), flush=True)
        asked_now = running - saving
        if asked_now:
            stopping = wording.stopping_text({stage for stage, _ in asked_now})
            print(f"{counted(len(asked_now), 'running element')}: {stopping}", flush=True)
        saving = (saving & active.keys()) | running

        if not active and not is_locked(run_dir.lock):
            print(f"next: continue from the saved state with {wording.program()} retry {wording.name_of(run_dir)}")
            return OK
        if time.monotonic() > deadline:
            return _report_unsaved(run_dir, list(active.values()))
        for stage, name in running:
            _request_stop(run_dir.element(stage, name))
        # Slurm may have requeued some.
        _cancel_jobs([state.job for state in active.values() if state.state == State.QUEUED], run_dir, plan)
        time.sleep(POLL_SECONDS)


def _report_unsaved(run_dir: RunDir, active: Sequence[ElementState]) -> int:
    """Explain what is still active after the time for saving, and return the exit code."""
    raise_if_unknown(active, "cancel", f"running elements were asked to save {MAX_SAVE_SECONDS:.0f} s ago")
    if active:
        names = ", ".join(f"{state.stage} {state.name}" for state in active)
        print(f"still saving after {MAX_SAVE_SECONDS:.0f} s: {names}; they stop as soon as they have saved")
    else:
        print(
            f"amlaunch local is still running {run_dir.root.name} on {launcher_host(run_dir)}: "
            "press Ctrl-C where it was started"
        )
    return FAILED
