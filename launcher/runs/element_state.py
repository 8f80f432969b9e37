"""Determine the state of elements: done marker first, then the lock or the Slurm job, then the newest attempt.

Absence of information never means completion.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlaunch.launcher.runs.attempt_record import AttemptEnd
from amlaunch.launcher.runs.element_files import ElementFiles, ElementProgress, read_element_files
from amlaunch.launcher.runs.states import ACTIVE_STATES, BROKEN_STATES, Outcome, State
from amlaunch.launcher.specs.plan import Plan, Stage
from amlaunch.recipes.files import is_locked
from amlaunch.recipes.run_layout import ElementDir, RunDir

# A list of runs that never were on a cluster needs none of them.
if TYPE_CHECKING:
    from amlaunch.launcher.runs.submissions import Submission
    from amlaunch.launcher.slurm.client import JobInfo
    from amlaunch.launcher.slurm.queue import Queue


@dataclass(frozen=True)
class ElementState:
    """The current state of one element."""

    stage: str
    name: str
    title: str
    state: State
    attempts: int = 0
    progress: ElementProgress = field(default_factory=ElementProgress)
    is_starting: bool = False
    """True if the element runs and has sent no heartbeat yet: ``progress`` is that of an earlier attempt."""
    result: dict[str, Any] = field(default_factory=dict)
    """The done marker of a finished element."""
    reason: str = ""
    rank: int | None = None
    """The rank whose log explains a failure."""
    retry: bool = True
    """False if the same command would fail again."""
    needs_fix: bool = False
    """True if the element would fail again until its recipe, code, input or cluster profile is corrected."""
    host: str = ""
    seconds: float | None = None
    """Duration of the newest attempt so far."""
    job: str = ""
    """Slurm job ID, ``123_4``."""
    nodes: str = ""
    start: str = ""
    """Slurm's estimate of the start of a queued element."""
    gpu_hours: float = 0.0
    """GPUs times hours over all attempts."""
    ran: tuple[tuple[float, float], ...] = ()
    """Start and end of each attempt in Unix seconds; without a recorded end, its last sign of life."""
    log: Path | None = None
    """The job's own output, for the case that no rank of the newest attempt has a log."""
    resume_options: str = ""
    """Options of ``amlaunch resume`` without which the element would fail again."""
    dependency_failed: bool = False
    """True if Slurm cancelled the job because an earlier stage did not finish."""

    @property
    def has_saved(self) -> bool:
        """Return True if another attempt would continue from saved work."""
        return bool(self.progress.saved_position)


def read_element(run: RunDir, stage: str, name: str, title: str = "") -> ElementState:
    """Return the state of one element from the files and locks that this machine sees, without asking Slurm."""
    folder = run.element(stage, name)
    return _local_state(_ElementRecord(stage, name, title, folder, read_element_files(folder)))


def read_stage(run: RunDir, stage: Stage) -> list[ElementState]:
    """Return the states of a stage's elements, without asking Slurm."""
    return [read_element(run, stage.name, element.name, element.title) for element in stage.elements]


def read_run(run: RunDir, plan: Plan, queue: Queue | None = None) -> list[ElementState]:
    """Return the states of a run's elements, in the order of the plan."""
    if queue is None:
        from amlaunch.launcher.slurm.queue import Queue

        queue = Queue()
    return read_runs([(run, plan)], queue)[0]


def read_runs(runs: Iterable[tuple[RunDir, Plan]], queue: Queue) -> list[list[ElementState]]:
    """Return the states of the elements of several runs, with one squeue and at most one sacct for all of them."""
    from amlaunch.launcher.runs.submissions import submissions_of

    inputs = [(run, plan, submissions_of(run, plan)) for run, plan in runs]
    if any(submissions for _, _, by_stage in inputs for submissions in by_stage.values()):
        # Ask before reading files: a job that ends in between has left its marker. The other order would lose it.
        _ = queue.jobs
    records = [list(_read_records(run, plan, by_stage)) for run, plan, by_stage in inputs]
    queue.query_accounting(_unexplained_arrays([record for of_run in records for record in of_run], queue))
    return [_explain_dependencies([_state(record, queue) for record in of_run]) for of_run in records]


@dataclass(frozen=True)
class _ElementRecord:
    """An element, its files, and its newest submission, before Slurm is asked about it."""

    stage: str
    name: str
    title: str
    folder: ElementDir
    files: ElementFiles
    submitted: tuple[Submission, int] | None = None
    """The newest submission that contains the element, and its index in the array."""

    def state(self, state: State, **known: Any) -> ElementState:
        """Return an ElementState with what the files say, changed and completed by ``known``."""
        start = self.files.history.newest_start
        from_files = {
            "stage": self.stage,
            "name": self.name,
            "title": self.title,
            "attempts": len(self.files.history.starts),
            "progress": self.files.progress,
            "is_starting": state == State.RUNNING and self.files.awaits_heartbeat,
            "host": start.host if start else "",
            "nodes": start.nodes if start else "",
            "ran": self.files.attempt_spans,
            "gpu_hours": self.files.gpu_hours,
        }
        return ElementState(**{**from_files, **known}, state=state)

    @property
    def ran_here_since(self) -> bool:
        """Return True if the newest attempt was made on this machine after the submission."""
        start = self.files.history.newest_start
        if self.submitted is None or start is None:
            return False
        return start.time > self.submitted[0].time and not start.is_array_task


def _read_records(run: RunDir, plan: Plan, submissions: dict[str, list[Submission]]) -> Iterator[_ElementRecord]:
    from amlaunch.launcher.runs.submissions import newest_jobs

    for stage in plan.stages:
        jobs = newest_jobs(submissions[stage.name])
        folder = run.stage(stage.name)
        # One listing instead of a look at each element.
        begun = set(os.listdir(folder)) if folder.is_dir() else set()
        for element in stage.elements:
            place = ElementDir(folder / element.name)
            files = read_element_files(place) if element.name in begun else ElementFiles()
            yield _ElementRecord(stage.name, element.name, element.title, place, files, jobs.get(element.name))


def _state(record: _ElementRecord, queue: Queue) -> ElementState:
    if record.submitted is None or record.ran_here_since:
        return _local_state(record)
    return _slurm_state(record, *record.submitted, queue)


# --- elements of this machine ---------------------------------------------------------------------------


def _local_state(record: _ElementRecord) -> ElementState:
    files = record.files
    if files.done is not None:
        return record.state(State.DONE, result=files.done.record, seconds=files.done.seconds)
    start = files.history.newest_start
    if is_locked(record.folder.lock):
        return record.state(State.RUNNING, seconds=time.time() - start.time if start else 0.0)
    if files.missing_output:
        return _pending_again(record)
    if files.history.newest_end is not None:
        return _ended(record, files.history.newest_end)
    if start is None:
        return record.state(State.PENDING)
    reason = f"attempt {start.attempt} ended without recording a result (killed, or the machine went down)"
    return record.state(State.DIED, reason=reason)


def _pending_again(record: _ElementRecord, **known: Any) -> ElementState:
    return record.state(State.PENDING, reason=f"finished earlier, but {record.files.missing_output}", **known)


def _ended(record: _ElementRecord, end: AttemptEnd, **known: Any) -> ElementState:
    """Return the state of an element whose newest attempt recorded its end."""
    # Only the marker makes an element done.
    if end.outcome == Outcome.DONE:
        return record.state(State.PENDING, reason="finished earlier, but its done marker is missing", **known)
    if end.host:
        known["host"] = end.host
    if end.kind:
        from amlaunch.launcher.runs.failure_causes import needs_fix, resume_options_for

        known["resume_options"] = resume_options_for(end.kind, record.stage)
        known["needs_fix"] = needs_fix(end.kind)
    return record.state(
        State(end.outcome.value), reason=end.reason, rank=end.rank, retry=end.retryable, seconds=end.seconds, **known
    )


# --- elements that were submitted to Slurm --------------------------------------------------------------


def _slurm_state(record: _ElementRecord, submission: Submission, index: int, queue: Queue) -> ElementState:
    """Return the state of a submitted element: marker, queue, its driver's record, accounting; else ``unknown``."""
    files = record.files
    if files.done is not None:
        job = submission.task(index) if submission.job else ""
        return record.state(State.DONE, result=files.done.record, seconds=files.done.seconds, job=job)
    if submission.job is None:
        reason = "sbatch did not answer; run the same submit command again to find out whether it accepted the job"
        return record.state(State.UNKNOWN, reason=reason)

    job = submission.task(index)
    known: dict[str, Any] = {"job": job, "log": submission.log(index)}
    end = _end_in_job(record, job)
    is_final = end is not None and not end.restart
    if queue.is_elsewhere(submission.slurm):
        if end is not None and is_final:
            return _ended(record, end, **known)
        return _on_other_cluster(record, submission.slurm, known)

    info = queue.job(job)
    if info is not None and info.active and not _overrules_queue(end, info, queue):
        return _active(record, info, queue.time, known)
    if end is not None and (is_final or (info is None and queue.jobs is not None)):
        return _ended(record, end, **known)
    if files.missing_output:
        return _pending_again(record, **known)
    if info is not None:
        return _ended_according_to_slurm(record, info, known)
    return _unexplained(record, queue, known)


def _end_in_job(record: _ElementRecord, job: str) -> AttemptEnd | None:
    """Return the end that the driver recorded in this job; an end in another job says nothing about this one."""
    start = record.files.history.newest_start
    return record.files.history.newest_end if start and start.job == job else None


def _overrules_queue(end: AttemptEnd | None, info: JobInfo, queue: Queue) -> bool:
    """Return True if the driver's record is newer than Slurm's answer that the job is active.

    A driver that was ended from outside cannot know whether Slurm requeues the job.
    """
    if end is None or end.restart or end.outcome == Outcome.CANCELLED:
        return False
    return not info.waiting or end.time > queue.time


def _active(record: _ElementRecord, info: JobInfo, requested_at: float, known: dict[str, Any]) -> ElementState:
    """Return the state of a job that Slurm knows; ``requested_at``: the time of Slurm's answer."""
    start, end = record.files.history.newest_start, record.files.history.newest_end
    is_own_start = start is not None and start.job == info.id
    started_since = start is not None and is_own_start and start.time > requested_at and end is None
    if info.waiting and not started_since:
        reason = _pending_reason(info.reason, end)
        return record.state(State.QUEUED, reason=reason, start=info.start, **known)
    if info.nodes:
        known["nodes"] = info.nodes
    seconds = time.time() - start.time if start and is_own_start else None
    return record.state(State.RUNNING, seconds=seconds, **known)


def _pending_reason(slurm_reason: str, end: AttemptEnd | None) -> str:
    from amlaunch.launcher.runs.slurm_reasons import pending_reason

    reason = pending_reason(slurm_reason)
    return f"{reason} (previous attempt: {end.reason})" if end and end.restart and end.reason else reason


def _ended_according_to_slurm(record: _ElementRecord, info: JobInfo, known: dict[str, Any]) -> ElementState:
    """Return the state of a job that ended before its driver recorded a result."""
    from amlaunch.launcher.runs.failure_causes import cause_of, cause_with, needs_fix, resume_options_for, tail_of
    from amlaunch.launcher.runs.slurm_reasons import explain_end

    job_end = explain_end(info, started=bool(record.files.history.starts))
    reason = job_end.reason
    if job_end.state == State.FAILED:
        cause = cause_with(job_end.kind) or cause_of(tail_of(known["log"]))
        if cause is not None:
            reason = cause.explain(reason, record.stage, is_named=cause.kind == job_end.kind)
            known["resume_options"] = resume_options_for(cause.kind, record.stage)
            known["needs_fix"] = needs_fix(cause.kind)
    if info.nodes:
        known["nodes"] = info.nodes
    return record.state(job_end.state, reason=reason, dependency_failed=job_end.dependency_failed, **known)


def _on_other_cluster(record: _ElementRecord, cluster: str, known: dict[str, Any]) -> ElementState:
    """Return ``unknown``: this cluster's job with the same number is another job."""
    reason = (
        f"job {known['job']} belongs to Slurm cluster {cluster}, which this machine cannot query; "
        f"run the command there; {_last_sign(record)}"
    )
    return record.state(State.UNKNOWN, reason=reason, **known)


def _unexplained(record: _ElementRecord, queue: Queue, known: dict[str, Any]) -> ElementState:
    """Return the state of a job that neither recorded an end nor is known to Slurm."""
    job = known["job"]
    owner = _other_owner(known["log"])
    if owner:
        reason = (
            f"job {job} belongs to {owner}, and Slurm shows you only your own jobs; try: squeue -j {job.split('_')[0]}"
        )
        return record.state(State.UNKNOWN, reason=reason, **known)
    if queue.jobs is None:
        problems = "; ".join(dict.fromkeys(queue.problems))
        reason = f"Slurm does not answer ({problems}); {_last_sign(record)}"
        return record.state(State.UNKNOWN, reason=reason, **known)
    return record.state(State.DIED, reason=f"Slurm no longer knows job {job}, which recorded no result", **known)


def _last_sign(record: _ElementRecord) -> str:
    seen = record.files.last_sign_of_life
    if not seen:
        return "no sign of life yet"
    return f"last sign of life {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(seen))}"


def _other_owner(log: Path) -> str:
    """Return the user who submitted the job, from the owner of its folder; empty if it is this user."""
    import pwd

    try:
        owner = log.parent.stat().st_uid
        return "" if owner == os.getuid() else pwd.getpwuid(owner).pw_name
    except (OSError, KeyError):
        return ""


def _unexplained_arrays(records: Iterable[_ElementRecord], queue: Queue) -> set[str]:
    """Return the arrays to ask accounting about: no marker, no recorded end, and not in the queue."""
    arrays = set()
    for record in records:
        if record.submitted is None or record.files.done is not None:
            continue
        submission, index = record.submitted
        if submission.job is None or queue.is_elsewhere(submission.slurm):
            continue
        job = submission.task(index)
        if job not in (queue.jobs or {}) and not _end_in_job(record, job):
            arrays.add(submission.job)
    return arrays


# --- several elements -----------------------------------------------------------------------------------


def _explain_dependencies(states: list[ElementState]) -> list[ElementState]:
    """Correct the reason of jobs that Slurm cancelled for a dependency.

    Slurm gives the same reason if the earlier stage failed, was stopped, or was cancelled together with them.
    """
    from amlaunch.launcher.runs.slurm_reasons import NEVER_STARTED, PREDECESSOR_FAILED

    if not any(state.dependency_failed for state in states):
        return states
    broken = {state.stage for state in states if state.state in BROKEN_STATES}
    stopped = {state.stage for state in states if state.state == State.STOPPED}
    reasons: dict[str, str] = {}
    # In the plan's order: each waits for those before it.
    for stage in dict.fromkeys(state.stage for state in states):
        if broken & reasons.keys():
            reasons[stage] = PREDECESSOR_FAILED
        elif stopped & reasons.keys():
            reasons[stage] = "an earlier stage was stopped"
        else:
            reasons[stage] = NEVER_STARTED
    return [replace(state, reason=reasons[state.stage]) if state.dependency_failed else state for state in states]


def is_driven(run: RunDir, states: Iterable[ElementState]) -> bool:
    """Return True if the run advances without help: a local launcher drives it, or an element is running or queued."""
    return is_locked(run.lock) or any(state.state in ACTIVE_STATES for state in states)


def overall_state(states: Sequence[ElementState], driven: bool = False) -> State:
    """Return the state of a run: the most urgent state of its elements; done only if all are done."""
    states_present = {state.state for state in states}
    if driven:
        return State.QUEUED if State.QUEUED in states_present and State.RUNNING not in states_present else State.RUNNING
    active_or_broken = states_present & {*BROKEN_STATES, State.CANCELLED, *ACTIVE_STATES}
    if State.DONE in states_present and State.PENDING in states_present and not active_or_broken:
        return State.STOPPED
    return next((state for state in State if state in states_present), State.PENDING)
