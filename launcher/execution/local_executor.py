"""Run the elements of a plan as processes of this machine, through submitit.

A queue gives each element its CPUs and its own GPUs. Finished elements are skipped; an element that an earlier, killed
launcher left running is waited for, not started twice.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amlaunch.launcher.execution.attempt import Assignment
from amlaunch.launcher.execution.driver import run_element
from amlaunch.launcher.runs.attempt_record import AttemptEnd, AttemptHistory, AttemptStart, append_attempt
from amlaunch.launcher.runs.element_state import ElementState, read_element, read_stage
from amlaunch.launcher.runs.states import Outcome, State
from amlaunch.launcher.specs.machine import Machine
from amlaunch.launcher.specs.plan import Needs, Plan, Stage
from amlaunch.recipes.files import is_locked, signal_lock_holders
from amlaunch.recipes.run_layout import ElementDir, RunDir

POLL_SECONDS = 0.2
MAX_LAUNCHES = 3
"""Number of times to launch a driver that never begins an attempt."""
NO_TIME_LIMIT = 60 * 24 * 365
"""In minutes; submitit's local jobs end after two by default."""

Report = Callable[[list[ElementState]], None]


@dataclass
class Capacity:
    """Free CPUs and GPUs of this machine."""

    total_cpus: int
    cpus: int
    gpus: list[str]
    assignments: dict[str, Assignment] = field(default_factory=dict)
    """By the name of the element."""

    def acquire(self, name: str, needs: Needs, launcher_lock: str) -> Assignment | None:
        """Take resources for an element; None if they are not free. A request for too many CPUs gets all of them."""
        cpus = min(needs.cpus, self.total_cpus)
        if cpus > self.cpus or needs.gpus_per_node > len(self.gpus):
            return None
        assignment = Assignment(
            cpus,
            tuple(self.gpus[: needs.gpus_per_node]),
            launcher_lock,
            budget=f"{platform.node()}:{os.getpid()}",
            total_gpus=needs.gpus_per_node,
        )
        self.cpus -= cpus
        del self.gpus[: needs.gpus_per_node]
        self.assignments[name] = assignment
        return assignment

    def release(self, name: str) -> None:
        """Free the resources of an element."""
        assignment = self.assignments.pop(name, None)
        if assignment:
            self.cpus += assignment.cpus
            self.gpus += assignment.gpus


class LocalExecutor:
    """Runs the stages of one plan in turn, each stage's elements side by side."""

    def __init__(self, run: RunDir, plan: Plan, machine: Machine, report: Report):
        self.run = run
        self.plan = plan
        self.report = report
        self.capacity = Capacity(machine.cpus, machine.cpus, list(machine.gpus))
        self.jobs: dict[str, Any] = {}
        """submitit jobs by ``stage/element``."""
        self.stopping = False
        self.stage = ""
        """The name of the stage that runs."""

    def execute(self, stages: list[Stage]) -> bool:
        """Run ``stages``; True once all is done, False after a failure or :meth:`stop`.

        After a failure, only elements whose own input is done still run.
        """
        is_done = True
        for stage in stages:
            if self.stopping or not (is_done or stage.elementwise):
                return False
            is_done = self._run_stage(stage) and is_done
        return is_done

    def stop(self) -> None:
        """Ask running elements to save and stop, and start no more."""
        self.stopping = True
        for folder in self._running_elements():
            folder.stop.touch()

    def kill(self) -> None:
        """End everything that this executor started at once; the next start continues from the last checkpoint."""
        for job in self.jobs.values():
            # A child of ours: nobody else gets its process ID before we have seen its end.
            if not job.done():
                with suppress(ProcessLookupError):
                    os.kill(int(job.job_id), signal.SIGKILL)
        for folder in self._running_elements():
            signal_lock_holders(folder.lock, signal.SIGKILL)

    def _running_elements(self) -> Iterator[ElementDir]:
        """Yield the running elements, except those that another run makes for shards that both share."""
        for stage in self.plan.stages:
            for element in stage.elements:
                folder = self.run.element(stage.name, element.name)
                is_own = self.run.stage_home(stage.name) == self.run.root or f"{stage.name}/{element.name}" in self.jobs
                if is_own and is_locked(folder.lock):
                    yield folder

    def _run_stage(self, stage: Stage) -> bool:
        self.stage = stage.name
        waiting = [element.name for element in stage.elements if self._state(stage, element.name).state != State.DONE]
        if stage.elementwise:
            source = self.plan.stage(stage.after[0])
            waiting = [name for name in waiting if self._state(source, name).state == State.DONE]
        launches = dict.fromkeys(waiting, 0)
        # The number of attempts before the launch, by element.
        active: dict[str, int] = {}
        self.report(read_stage(self.run, stage))
        while (waiting and not self.stopping) or active:
            for name in list(waiting):
                attempts = self._state(stage, name).attempts
                if not self.stopping and self._launch(stage, name):
                    waiting.remove(name)
                    active[name] = attempts
            time.sleep(POLL_SECONDS)
            if self.stopping or self.run.stop.exists():
                # Ask again: an element that was just being launched can only now be asked.
                self.stop()
            for name in [name for name in active if not self._is_active(stage, name)]:
                attempts = active.pop(name)
                if self._restarts(stage, name, attempts):
                    waiting.append(name)
                elif self._never_began(stage, name, attempts) and not self.stopping:
                    launches[name] += 1
                    if launches[name] < MAX_LAUNCHES:
                        waiting.append(name)
                    else:
                        self._record_launch_failure(stage, name)
            self.report(read_stage(self.run, stage))
        return not waiting and all(state.state == State.DONE for state in read_stage(self.run, stage))

    def _state(self, stage: Stage, name: str) -> ElementState:
        return read_element(self.run, stage.name, name)

    def _history(self, stage: Stage, name: str) -> AttemptHistory:
        return AttemptHistory.read(self.run.element(stage.name, name).attempts)

    def _launch(self, stage: Stage, name: str) -> bool:
        """Launch the driver of an element; False if there are no free resources for it."""
        if is_locked(self.run.element(stage.name, name).lock):
            # Left by a killed launcher: wait for it.
            return True
        assignment = self.capacity.acquire(f"{stage.name}/{name}", stage.needs, str(self.run.lock))
        if assignment is None:
            return False
        self.jobs[f"{stage.name}/{name}"] = launch_driver(self.run, stage.name, name, assignment)
        return True

    def _restarts(self, stage: Stage, name: str, attempts_before: int) -> bool:
        """Return True if our own attempt ended in a way for which a driver on Slurm would requeue its job."""
        history = self._history(stage, name)
        if self.stopping or len(history.starts) == attempts_before:
            return False
        return history.newest_end is not None and history.newest_end.restart

    def _never_began(self, stage: Stage, name: str, attempts_before: int) -> bool:
        """Return True if we made no attempt.

        Either our driver did not begin, or an element left by a killed launcher ended unfinished.
        """
        state = self._state(stage, name)
        return state.state != State.DONE and state.attempts == attempts_before

    def _record_launch_failure(self, stage: Stage, name: str) -> None:
        """Record a failed attempt in place of the driver, which never began."""
        attempts = self.run.element(stage.name, name).attempts
        number = AttemptHistory.read(attempts).next_number
        error = _last_error(self.run.jobs / stage.name / name)
        reason = (
            f"the driver did not start in {MAX_LAUNCHES} tries{': ' + error if error else ''} (logs: {self.run.jobs})"
        )
        append_attempt(attempts, AttemptStart(number, host=platform.node()))
        append_attempt(attempts, AttemptEnd(Outcome.FAILED, reason, attempt=number))

    def _is_active(self, stage: Stage, name: str) -> bool:
        key = f"{stage.name}/{name}"
        job = self.jobs.get(key)
        if (job is not None and not job.done()) or is_locked(self.run.element(stage.name, name).lock):
            return True
        self.jobs.pop(key, None)
        self.capacity.release(key)
        return False


def _last_error(jobs: Path) -> str:
    """Return the last line on standard error of the newest submitit job in a folder; empty if there is none."""
    logs = sorted(jobs.glob("*_log.err"), key=lambda path: path.stat().st_mtime)
    lines = [line for path in logs for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


@contextmanager
def _job_environment(run: RunDir) -> Iterator[None]:
    """Set the environment that a submitit process inherits: the run's code first on the path, and no Ctrl-C.

    Blocked signals stay blocked in children, which are asked to stop by a file; the launcher's own are delivered
    afterwards.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(run.code), before.get("PYTHONPATH", "")]))
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def launch_driver(run: RunDir, stage: str, name: str, assignment: Assignment) -> Any:
    """Start the driver of one element as a submitit job of this machine."""
    import submitit

    folder = run.jobs / stage / name
    with _job_environment(run):
        executor = submitit.LocalExecutor(folder)
        # Without GPUs: the driver itself assigns them to ranks.
        executor.update_parameters(timeout_min=NO_TIME_LIMIT)
        return executor.submit(run_element, str(run.root), stage, name, assignment)
