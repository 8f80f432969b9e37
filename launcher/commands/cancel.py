"""``amlaunch cancel``: end what runs and what waits; with ``--checkpoint`` what runs saves first."""

from __future__ import annotations

import argparse
import platform
import signal
import time
from collections.abc import Sequence

from amlaunch.launcher.commands._shared import add_run
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
from amlaunch.recipes.files import is_locked, read_json_lines, read_object, signal_lock_holders
from amlaunch.recipes.run_layout import ElementDir, RunDir

SAVE_SECONDS = 300.0
"""How long ranks may take to save before we stop waiting for the word that they have."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch cancel``."""
    add_run(parser)
    parser.add_argument(
        "--checkpoint", action="store_true", help="let running elements save a checkpoint first, and wait for them"
    )


def run(options: argparse.Namespace) -> int:
    """Exit code 0 once nothing of the run goes on (with ``--checkpoint``), or once all that goes on was told to end."""
    run_dir = find_run(roots(options.runs), options.run)
    with submitting(run_dir, read_plan(run_dir)):  # a submit in progress would add stages behind our back
        plan = read_plan(run_dir)  # as that submit has left it
        _recover(run_dir, plan)
        states = read_run(run_dir, plan, Queue(max_age=0))
        mine = own_states(run_dir, plan, states)
        refuse_unknown(mine, "cancel", "nothing was cancelled; try again when Slurm answers")
        going = [state for state in mine if state.state in ACTIVE_STATES]
        if not going and not is_locked(run_dir.lock):
            others = (
                " (another run, which shares its shards, makes them)"
                if any(state.state in ACTIVE_STATES for state in states)
                else ""
            )
            print(f"{plan.run_id}: nothing of it runs or waits{others}")
            return OK
        _cancel_jobs(
            [state.job for state in going if state.job and (state.state == State.QUEUED or not options.checkpoint)],
            run_dir,
            plan,
        )
    _stop_launcher(run_dir)
    _end_here(run_dir, [state for state in going if not state.job], save=options.checkpoint)
    if options.checkpoint:
        return _wait_until_saved(run_dir, plan)
    print(
        f"next: {wording.program()} status {wording.name_of(run_dir)}; {wording.program()} retry {wording.name_of(run_dir)} goes on from the last checkpoint"
    )
    return OK


def own_states(run_dir: RunDir, plan: Plan, states: Sequence[ElementState]) -> list[ElementState]:
    """Without what another run makes of the shards that both share: that is not ours to end."""
    jobs = _own_jobs(run_dir, plan)
    return [
        state
        for state in states
        if (state.job in jobs if state.job else state.state != State.RUNNING or _started_it(run_dir, state))
    ]


def refuse_unknown(states: Sequence[ElementState], command: str, words: str) -> None:
    """Raises SlurmError where nobody can say whether an element still runs."""
    lost = [state for state in states if state.state == State.UNKNOWN]
    if lost:
        more = f" (and {len(lost) - 1} more)" if lost[1:] else ""
        raise SlurmError(command, f"{lost[0].stage} {lost[0].name}{more}: {lost[0].reason}; {words}")


def _recover(run_dir: RunDir, plan: Plan) -> None:
    """Find the jobs whose number an interrupted submit did not write down: they are to be cancelled, too. Raises SlurmError."""
    try:
        recover(run_dir, plan, lambda text: print(text, flush=True))
    except SlurmError as error:
        raise SlurmError(
            error.command,
            f"{error.message}; a submit was interrupted, and whether its jobs run is not known: nothing was cancelled; try again when Slurm answers",
        ) from None


def _own_jobs(run_dir: RunDir, plan: Plan) -> set[str]:
    """The jobs that this run submitted."""
    own = str(run_dir.root)
    return {
        job
        for submissions in submissions_of(run_dir, plan).values()
        for one in submissions
        if one.run == own
        for job in one.tasks().values()
    }


def _started_it(run_dir: RunDir, state: ElementState) -> bool:
    """Whether this run's launcher started an element: submitit's files of its process are in the run that did."""
    if run_dir.stage_home(state.stage) == run_dir.root:
        return True
    lines = read_json_lines(run_dir.element(state.stage, state.name).attempts)
    job = next((line.get("job") for line in reversed(lines) if line.get("event") == "start"), None)
    return bool(job) and any((run_dir.jobs / state.stage / state.name).glob(f"{job}_*"))


def _cancel_jobs(jobs: Sequence[str], run_dir: RunDir, plan: Plan) -> None:
    if jobs:
        scancel(_together(jobs, run_dir, plan))
        print(f"cancelled {len(jobs)} job{'s' * (len(jobs) > 1)}", flush=True)
        queue_module.forget()


def _together(jobs: Sequence[str], run_dir: RunDir, plan: Plan) -> list[str]:
    """Whole arrays by their own number: 10,000 elements are not 10,000 arguments."""
    wanted, found = set(jobs), []
    for submissions in submissions_of(run_dir, plan).values():
        for one in submissions:
            tasks = [job for job in one.tasks().values() if job in wanted]
            found += [one.job or ""] if len(tasks) == len(one.elements) else tasks
    return found


def _stop_launcher(run_dir: RunDir) -> None:
    """Have amlaunch local start nothing more: by a signal, or by a file that it looks for, where it is out of reach."""
    if signal_lock_holders(run_dir.lock, signal.SIGTERM) or not is_locked(run_dir.lock):  # to it, this is Ctrl-C
        return
    run_dir.stop.touch()
    host, name = launcher_host(run_dir), wording.name_of(run_dir)
    print(
        f"amlaunch local drives {run_dir.root.name} on {host}, out of reach from here: asked to save and stop, which it does within seconds"
    )
    print(
        f"if {wording.program()} status {name} still shows it running then: on {host}, Ctrl-C where it was started, or amlaunch cancel {name}",
        flush=True,
    )


def launcher_host(run_dir: RunDir) -> str:
    """Where amlaunch local was started, for people."""
    host = str(read_object(run_dir.provenance).get("host") or "another machine")
    return f"{host} (this machine, by another user)" if host == platform.node() else host


def _end_here(run_dir: RunDir, states: Sequence[ElementState], *, save: bool) -> None:
    """Ask processes to save and leave, or end them."""
    ended = 0
    for state in states:
        folder = run_dir.element(state.stage, state.name)
        found = 0 if save else signal_lock_holders(folder.lock, signal.SIGKILL)
        ended += bool(found)
        if not found:
            _ask_to_leave(folder)
        if not found and not save:
            print(
                f"{state.stage} {state.name} runs on {state.host or 'another machine'}, out of reach from here: asked to save and leave"
            )
    if ended:
        print(f"ended {ended} element{'s' * (ended > 1)} on this machine", flush=True)


def _ask_to_leave(folder: ElementDir) -> None:
    folder.root.mkdir(parents=True, exist_ok=True)  # Slurm has started the job, its driver has not got here yet
    folder.stop.touch()


def _wait_until_saved(run_dir: RunDir, plan: Plan) -> int:
    """Until nothing of the run goes on; asked again and again, for one that was just starting did not hear it."""
    saving: set[tuple[str, str]] = set()
    deadline = time.monotonic() + SAVE_SECONDS
    while True:
        states = {
            (state.stage, state.name): state
            for state in own_states(run_dir, plan, read_run(run_dir, plan, Queue(max_age=2.0)))
        }
        going = {key: state for key, state in states.items() if state.state in (*ACTIVE_STATES, State.UNKNOWN)}
        for key in sorted(saving - going.keys()):
            print(wording.status_line(states[key]), flush=True)
        running = {key for key, state in going.items() if state.state == State.RUNNING}
        if running - saving:
            new = len(running - saving)
            print(f"{new} running element{'s' * (new > 1)}: saving, then leaving", flush=True)
        saving = (saving & going.keys()) | running
        if not going and not is_locked(run_dir.lock):
            print(f"next: {wording.program()} retry {wording.name_of(run_dir)} goes on from what was saved")
            return OK
        if time.monotonic() > deadline:
            return _not_saved(run_dir, list(going.values()))
        for stage, name in running:
            _ask_to_leave(run_dir.element(stage, name))
        _cancel_jobs(
            [state.job for state in going.values() if state.state == State.QUEUED], run_dir, plan
        )  # requeued meanwhile
        time.sleep(1.0)


def _not_saved(run_dir: RunDir, going: Sequence[ElementState]) -> int:
    refuse_unknown(going, "cancel", f"what ran was asked to save {SAVE_SECONDS:.0f} s ago")
    if going:
        print(
            f"still saving after {SAVE_SECONDS:.0f} s: {', '.join(f'{state.stage} {state.name}' for state in going)}; they leave as soon as they have"
        )
    else:
        print(
            f"amlaunch local still drives {run_dir.root.name} on {launcher_host(run_dir)}: end it where it was started, with Ctrl-C"
        )
    return FAILED
