"""The local executor: elements of a plan as processes of this machine, through submitit.

A queue gives each element its CPUs and its own GPUs. What is done is skipped;
what an earlier, killed launcher left running is waited for, not started twice.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from amlaunch.launcher.execution.attempt import Assignment
from amlaunch.launcher.execution.driver import run_element
from amlaunch.launcher.runs.element_state import ElementState, read_element, read_stage
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.specs.machine import Machine
from amlaunch.launcher.specs.plan import Needs, Plan, Stage
from amlaunch.recipes.files import append_json_line, is_locked, read_json_lines, signal_lock_holders
from amlaunch.recipes.run_layout import RunDir

POLL_SECONDS = 0.2
MAX_TRIES = 3
"""Starts of an element that never got as far as an attempt."""
NO_TIME_LIMIT = 60 * 24 * 365
"""Minutes; submitit's local jobs end after two unless told otherwise."""

Report = Callable[[list[ElementState]], None]


@dataclass
class Capacity:
    """CPUs and GPUs not in use."""

    total_cpus: int
    cpus: int
    gpus: list[str]
    taken: dict[str, Assignment] = field(default_factory=dict)

    def take(self, name: str, needs: Needs, watch: str) -> Assignment | None:
        """Resources for an element; None where they are not free. More CPUs than there are means all of them."""
        cpus = min(needs.cpus, self.total_cpus)
        if cpus > self.cpus or needs.gpus_per_node > len(self.gpus):
            return None
        budget, facts = f"{platform.node()}:{os.getpid()}", {"gpus": needs.gpus_per_node}
        given = Assignment(cpus, tuple(self.gpus[: needs.gpus_per_node]), watch, budget=budget, facts=facts)
        self.cpus -= cpus
        del self.gpus[: needs.gpus_per_node]
        self.taken[name] = given
        return given

    def give_back(self, name: str) -> None:
        """Free what an element had."""
        given = self.taken.pop(name, None)
        if given:
            self.cpus += given.cpus
            self.gpus += given.gpus


class LocalExecutor:
    """Runs the stages of one plan in turn, each stage's elements side by side."""

    def __init__(self, run: RunDir, plan: Plan, machine: Machine, report: Report):
        self.run = run
        self.plan = plan
        self.report = report
        self.capacity = Capacity(machine.cpus, machine.cpus, list(machine.gpus))
        self.jobs: dict[str, Any] = {}
        self.stopping = False

    def execute(self, stages: list[Stage]) -> bool:
        """Run ``stages`` until all is done (True), or one fails or :meth:`stop` was called (False)."""
        return all(self._stage(stage) for stage in stages)

    def stop(self) -> None:
        """Ask what runs to save and leave, and start nothing more."""
        self.stopping = True
        for stage in self.plan.stages:
            for element in stage.elements:
                folder = self.run.element(stage.name, element.name)
                if self._is_ours(stage, element.name) and is_locked(folder.lock):
                    folder.stop.touch()

    def _is_ours(self, stage: Stage, name: str) -> bool:
        """Not an element of shards that another run makes for both."""
        return self.run.stage_home(stage.name) == self.run.root or f"{stage.name}/{name}" in self.jobs

    def kill(self) -> None:
        """End what this executor started at once; the next start goes on from the last checkpoint."""
        for job in self.jobs.values():
            if not job.done():  # our own child: its number is nobody else's before we have seen its end
                with suppress(ProcessLookupError):
                    os.kill(int(job.job_id), signal.SIGKILL)
        for stage in self.plan.stages:
            for element in stage.elements:
                folder = self.run.element(stage.name, element.name)
                if self._is_ours(stage, element.name) and is_locked(folder.lock):
                    signal_lock_holders(folder.lock, signal.SIGKILL)

    def _stage(self, stage: Stage) -> bool:
        waiting = [element.name for element in stage.elements if self._state(stage, element.name).state != State.DONE]
        tries = dict.fromkeys(waiting, 0)
        active: dict[str, int] = {}
        self.report(read_stage(self.run, stage))
        while (waiting and not self.stopping) or active:
            for name in list(waiting):
                attempts = self._state(stage, name).attempts
                if not self.stopping and self._start(stage, name):
                    waiting.remove(name)
                    active[name] = attempts
            time.sleep(POLL_SECONDS)
            if self.stopping or self.run.stop.exists():
                self.stop()  # again: one that was just being started has only now become able to hear it
            for name in [name for name in active if not self._is_active(stage, name)]:
                before = active.pop(name)
                if self._goes_again(stage, name, before):
                    waiting.append(name)
                elif self._came_to_nothing(stage, name, before) and not self.stopping:
                    tries[name] += 1
                    if tries[name] < MAX_TRIES:
                        waiting.append(name)
                    else:
                        self._give_up(stage, name)
            self.report(read_stage(self.run, stage))
        return not waiting and all(state.state == State.DONE for state in read_stage(self.run, stage))

    def _state(self, stage: Stage, name: str) -> ElementState:
        return read_element(self.run, stage, name, "")

    def _start(self, stage: Stage, name: str) -> bool:
        if is_locked(self.run.element(stage.name, name).lock):
            return True  # left over from a launcher that was killed: it is waited for
        given = self.capacity.take(f"{stage.name}/{name}", stage.needs, str(self.run.lock))
        if given is None:
            return False
        self.jobs[f"{stage.name}/{name}"] = submit(self.run, stage.name, name, given)
        return True

    def _goes_again(self, stage: Stage, name: str, attempts_before: int) -> bool:
        """Whether our own attempt ended in a way that the driver would have Slurm requeue it for: the same rules here."""
        if self.stopping or self._state(stage, name).attempts == attempts_before:
            return False
        ends = [
            line for line in read_json_lines(self.run.element(stage.name, name).attempts) if line.get("event") == "end"
        ]
        return (
            bool(ends) and ends[-1].get("attempt") == self._state(stage, name).attempts and bool(ends[-1].get("again"))
        )

    def _came_to_nothing(self, stage: Stage, name: str, attempts_before: int) -> bool:
        """Whether no attempt of ours was made: a leftover ended unfinished, or the driver never began."""
        state = self._state(stage, name)
        return state.state != State.DONE and state.attempts == attempts_before

    def _give_up(self, stage: Stage, name: str) -> None:
        """Write down, in the driver's stead, that it never began."""
        folder = self.run.element(stage.name, name)
        logs = sorted((self.run.jobs / stage.name / name).glob("*_log.err"), key=lambda path: path.stat().st_mtime)
        words = [
            line.strip() for path in logs for line in path.read_text(errors="replace").splitlines() if line.strip()
        ]
        reason = f"the driver did not start in {MAX_TRIES} tries{': ' + words[-1] if words else ''} (logs in {self.run.jobs})"
        attempt = self._state(stage, name).attempts + 1
        append_json_line(
            folder.attempts, {"event": "start", "attempt": attempt, "time": time.time(), "host": platform.node()}
        )
        append_json_line(
            folder.attempts,
            {"event": "end", "attempt": attempt, "time": time.time(), "outcome": State.FAILED, "reason": reason},
        )

    def _is_active(self, stage: Stage, name: str) -> bool:
        key = f"{stage.name}/{name}"
        job = self.jobs.get(key)
        if (job is not None and not job.done()) or is_locked(self.run.element(stage.name, name).lock):
            return True
        self.jobs.pop(key, None)
        self.capacity.give_back(key)
        return False


@contextmanager
def _job_environment(run: RunDir) -> Iterator[None]:
    """What a submitit process inherits: the run's code first on the path, and no share in our Ctrl-C.

    Blocked signals stay blocked in children, who are asked to stop by a file;
    ours that come meanwhile are delivered afterwards.
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


def submit(run: RunDir, stage: str, name: str, given: Assignment) -> Any:
    """Start the driver of one element as a submitit job of this machine."""
    import submitit

    folder = run.jobs / stage / name
    with _job_environment(run):
        executor = submitit.LocalExecutor(folder)
        executor.update_parameters(timeout_min=NO_TIME_LIMIT)  # the driver itself gives the ranks their GPUs
        return executor.submit(run_element, str(run.root), stage, name, given)
