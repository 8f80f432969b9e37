"""What happened to an element: its marker first, then its lock or its job, then its newest attempt. Absent never means completed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amlaunch.launcher.runs.states import ACTIVE_STATES, State
from amlaunch.launcher.specs.plan import Element, Plan, Stage
from amlaunch.recipes.files import is_locked, read_json_lines, read_object
from amlaunch.recipes.run_layout import ElementDir, RunDir

if TYPE_CHECKING:
    from amlaunch.launcher.runs.submissions import Submission
    from amlaunch.launcher.slurm.client import JobInfo
    from amlaunch.launcher.slurm.queue import Queue

SEVERITY = tuple(State)
ACTIVE = ACTIVE_STATES
FAILED, DIED, UNKNOWN, CANCELLED, RUNNING, QUEUED, STOPPED, PENDING, DONE = State


@dataclass(frozen=True)
class ElementState:
    """One element, now."""

    stage: str
    name: str
    title: str
    state: State
    attempts: int = 0
    progress: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    rank: int | None = None
    retry: bool = True
    """Whether the same command can end otherwise."""
    host: str = ""
    seconds: float | None = None
    """How long the newest attempt took, or takes so far."""
    job: str = ""
    """Slurm's number of it, ``123_4``."""
    nodes: str = ""
    start: str = ""
    """When a queued one will start, in Slurm's estimate."""
    gpu_hours: float = 0.0
    """GPUs x hours over all attempts."""
    ran: tuple[tuple[float, float], ...] = ()
    """When each attempt began and ended, in Unix seconds; of one without an end, its last sign of life."""
    log: Path | None = None
    """What to read where no rank of the newest attempt has a log: the job's own output."""


@dataclass(frozen=True)
class Trace:
    """What the files of one element say."""

    folder: ElementDir
    lines: list[dict[str, Any]]
    done: dict[str, Any] | None
    """The marker, where its outputs are as it says."""
    missing: str
    """What of a marker's outputs is not."""
    progress: dict[str, Any]

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The attempts, oldest first."""
        return [line for line in self.lines if line.get("event") == "start" and "attempt" in line and "time" in line]

    @property
    def end(self) -> dict[str, Any] | None:
        """How the newest attempt ended; None while nobody has said so."""
        starts = self.starts
        return _end_of(self.lines, starts[-1]["attempt"]) if starts else None


def trace(folder: ElementDir) -> Trace:
    """Read the files of one element."""
    done = read_done(folder)
    missing = missing_output(done) if done is not None else None
    marker = _sound(done, RESULT) if done is not None and missing is None else None
    lines = [_sound(line, RECORD) for line in read_json_lines(folder.attempts)]
    return Trace(folder, lines, marker, missing or "", _sound(read_object(folder.progress), RECORD))


NUMBER = (int, float)
Kinds = dict[str, type | tuple[type, ...]]
RECORD: Kinds = {
    **dict.fromkeys(("time", "seconds", "gpus", "done", "total", "rate", "eta_s", "loss", "val_loss", "saved"), NUMBER),
    **dict.fromkeys(("attempt", "rank"), int),
    **dict.fromkeys(("host", "nodes", "reason", "outcome", "unit"), str),
}
"""What attempts.jsonl and progress.json have."""
RESULT: Kinds = {
    **dict.fromkeys(
        ("time", "seconds", "tokens", "documents", "shards", "parameters", "tokens_per_s", "loss_first", "loss_last"),
        NUMBER,
    ),
    **dict.fromkeys(("sample", "checkpoint"), str),
}
"""What is shown of a marker; the rest is the stage's own."""
OPEN = ("total", "rate", "eta_s", "loss", "val_loss", "rank", "sample", "tokens_per_s", "loss_first", "loss_last")
"""Which may be null: nobody knows yet."""


def _sound(found: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
    """Without values that are not what they should be: a damaged file of one element hides none of the others."""
    return {
        key: value
        for key, value in found.items()
        if key not in kinds or isinstance(value, kinds[key]) or (value is None and key in OPEN)
    }


def read_element(run: RunDir, stage: Stage, name: str, title: str) -> ElementState:
    """The state of one element on this machine: its marker, then the lock of a live driver, then its newest attempt."""
    return _on_this_machine(stage.name, name, title, trace(run.element(stage.name, name)))


def _common(stage: str, name: str, title: str, found: Trace) -> dict[str, Any]:
    starts = found.starts
    common: dict[str, Any] = {
        "stage": stage,
        "name": name,
        "title": title,
        "attempts": len(starts),
        "progress": found.progress,
    }
    if starts:
        common |= {"host": starts[-1].get("host", ""), "nodes": starts[-1].get("nodes", "")}
        common["ran"] = _spans(found)
        hours = [
            (start.get("gpus") or 0) * (end - begun) / 3600
            for start, (begun, end) in zip(starts, common["ran"], strict=True)
        ]
        common["gpu_hours"] = round(sum(hours), 4)
    return common


def _spans(found: Trace) -> tuple[tuple[float, float], ...]:
    """Beginning and end of each attempt; one without an end lasted to the element's last sign of life."""
    ends = {line.get("attempt"): line.get("time", 0.0) for line in found.lines if line.get("event") == "end"}
    begun = [start["time"] for start in found.starts]
    signs = [*begun[1:], found.progress.get("time", 0.0)]  # the next attempt is one, too
    return tuple(
        (began, max(began, ends.get(start["attempt"]) or sign))
        for start, began, sign in zip(found.starts, begun, signs, strict=False)
    )


def _on_this_machine(stage: str, name: str, title: str, found: Trace) -> ElementState:
    common = _common(stage, name, title, found)
    if found.done is not None:
        return ElementState(**common, state=DONE, result=found.done, seconds=found.done.get("seconds"))
    if is_locked(found.folder.lock):
        since = found.starts[-1]["time"] if found.starts else time.time()
        return ElementState(**common, state=RUNNING, seconds=time.time() - since)
    return _as_left(common, found)


def _as_left(common: dict[str, Any], found: Trace) -> ElementState:
    """How an element that nobody works on was left."""
    if found.missing:
        return ElementState(**common, state=PENDING, reason=f"was done, but {found.missing}")
    if found.end is not None:
        return _as_ended(common, found.end)
    if found.starts:
        return ElementState(
            **common,
            state=DIED,
            reason=f"attempt {found.starts[-1]['attempt']} ended without a word (killed, or the machine went down)",
        )
    return ElementState(**common, state=PENDING)


def _as_ended(common: dict[str, Any], end: dict[str, Any]) -> ElementState:
    if end.get("outcome") == DONE:  # only the marker says so, and it is not there any more
        return ElementState(**common, state=PENDING, reason="was done once; its marker is gone")
    known = {
        "reason": end.get("reason", ""),
        "rank": end.get("rank"),
        "retry": end.get("retry", True),
        "seconds": end.get("seconds"),
    }
    host = end.get("host") or common.get("host", "")
    outcome = end.get("outcome")
    return ElementState(**{**common, "host": host}, state=State(outcome) if outcome in SEVERITY else DIED, **known)


def _on_slurm(
    stage: str, name: str, title: str, found: Trace, submission: Submission, index: int, queue: Queue
) -> ElementState:
    """The state of an element that was submitted: marker, queue, its own last word, accounting; else ``unknown``."""
    common = _common(stage, name, title, found)
    if found.done is not None:
        return ElementState(
            **common, state=DONE, result=found.done, seconds=found.done.get("seconds"), job=submission.task(index)
        )
    if submission.job is None:
        return ElementState(
            **common, state=UNKNOWN, reason="handed to sbatch, which did not answer; the same submit finds out"
        )
    job = submission.task(index)
    common |= {"job": job, "log": submission.log(index)}
    word = _left_word(found, job)
    if queue.is_elsewhere(submission.slurm):
        return (
            _as_ended(common, word)
            if word and not word.get("again")
            else _on_another_cluster(common, found, submission)
        )
    info = queue.job(job)
    final = word is not None and not word.get("again")  # a driver that goes on by itself has not said its last
    sure = (
        final and word and word.get("outcome") != CANCELLED
    )  # one that was ended from outside cannot know whether Slurm requeues it
    if (
        info is not None
        and info.active
        and not (sure and word and (not info.waiting or word.get("time", 0.0) > queue.time))
    ):
        return _active(common, found, info, queue.time)
    if word is not None and (final or (info is None and queue.jobs is not None)):
        return _as_ended(common, word)
    if found.missing:
        return ElementState(**common, state=PENDING, reason=f"was done, but {found.missing}")
    if info is not None:
        state, reason = explain_end(info, found)
        from amlaunch.launcher.runs.failure_causes import cause_of, tail_of

        said = f"{'Out Of Memory' if info.state == 'OUT_OF_MEMORY' else ''}\n{tail_of(submission.log(index))}"
        cause = cause_of(said) if state == FAILED else None
        reason = cause.explain(reason, stage) if cause else reason
        return ElementState(**{**common, "nodes": info.nodes or common.get("nodes", "")}, state=state, reason=reason)
    return _untold(common, found, job, queue)


def _left_word(found: Trace, job: str) -> dict[str, Any] | None:
    """The end that the driver wrote in this job; of another job it says nothing about this one."""
    starts = found.starts
    return found.end if starts and starts[-1].get("job") == job else None


def _active(common: dict[str, Any], found: Trace, info: JobInfo, asked: float) -> ElementState:
    newest = found.starts[-1] if found.starts else {}
    started_since = newest.get("job") == info.id and newest["time"] > asked and found.end is None
    if info.waiting and not started_since:
        earlier = found.end["reason"] if found.end and found.end.get("again") else ""
        reason = waiting_reason(info.reason) + (f" (before: {earlier})" if earlier else "")
        return ElementState(**common, state=QUEUED, reason=reason, start=info.start)
    began = found.starts[-1]["time"] if found.starts and found.starts[-1].get("job") == info.id else None
    seconds = time.time() - began if began else None
    return ElementState(**{**common, "nodes": info.nodes or common.get("nodes", "")}, state=RUNNING, seconds=seconds)


def _on_another_cluster(common: dict[str, Any], found: Trace, submission: Submission) -> ElementState:
    """Its number means another job here, or none."""
    words = f"job {common['job']} belongs to Slurm cluster {submission.slurm}, which is not the one of this machine: ask there; {_last_sign(found)}"
    return ElementState(**common, state=UNKNOWN, reason=words)


def _last_sign(found: Trace) -> str:
    signs = max([found.progress.get("time", 0.0), *(line.get("time", 0.0) for line in found.lines)])
    return (
        f"last sign of life {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(signs))}"
        if signs
        else "no sign of life yet"
    )


def _untold(common: dict[str, Any], found: Trace, job: str, queue: Queue) -> ElementState:
    owner = _other_owner(common["log"])
    if owner:
        return ElementState(
            **common,
            state=UNKNOWN,
            reason=f"job {job} is {owner}'s, and Slurm shows everybody his own: squeue -j {job.split('_')[0]}",
        )
    if queue.jobs is None:
        return ElementState(
            **common,
            state=UNKNOWN,
            reason=f"Slurm does not answer ({'; '.join(dict.fromkeys(queue.problems))}); {_last_sign(found)}",
        )
    return ElementState(**common, state=DIED, reason=f"Slurm no longer knows job {job}, and it left no word of its end")


def _other_owner(log: Path) -> str:
    """Who submitted the job, if not we did; its folder is his."""
    import pwd

    try:
        owner = log.parent.stat().st_uid
        return "" if owner == os.getuid() else pwd.getpwuid(owner).pw_name
    except (OSError, KeyError):
        return ""


BEFORE = "a stage before it did not finish"
ENDS = {
    "TIMEOUT": "reached its time limit before it had saved; give resources a longer time, or checkpoint more often",
    "NODE_FAIL": "its node failed",
    "OUT_OF_MEMORY": "ran out of memory",
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "its deadline passed",
    "PREEMPTED": "was preempted and not requeued",
    "REVOKED": "was revoked by another cluster",
}


def explain_end(info: JobInfo, found: Trace) -> tuple[State, str]:
    """``(state, reason)`` of a job that ended without a word from our driver, from Slurm's state for it."""
    if info.state == "CANCELLED":
        never = "DependencyNeverSatisfied" in info.reason or (not found.starts and not info.nodes)
        return (
            CANCELLED,
            BEFORE if "Dependency" in info.reason else "cancelled before it started" if never else "cancelled",
        )
    where = f" on {info.nodes}" if info.nodes else ""
    if info.state in ENDS:
        return FAILED, f"job {info.id}{where} {ENDS[info.state]}"
    code = f", exit code {info.exit_code}" if info.exit_code else ""
    return FAILED, f"job {info.id}{where} ended ({info.state}{code}) without a word from the driver"


WAITING = {
    "Priority": "jobs with a higher priority are before it",
    "Resources": "waits for free nodes",
    "Dependency": "waits for the stage before it",
    "DependencyNeverSatisfied": "a stage before it failed: it will not start",
    "BeginTime": "starts again in a moment (requeued)",
    "JobArrayTaskLimit": "waits for its siblings (throttle)",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is inactive",
    "PartitionTimeLimit": "asks for more time than its partition allows",
    "PartitionNodeLimit": "asks for more nodes than its partition allows",
    "ReqNodeNotAvail": "nodes it asked for are not available",
    "NodeDown": "a node it needs is down",
    "Licenses": "waits for a licence",
    "Reservation": "waits for its reservation",
    "AssocGrpGRES": "your account has as many GPUs in use as it may",
    "QOSMaxGRESPerUser": "you have as many GPUs in use as the QOS allows",
    "QOSMaxJobsPerUserLimit": "you have as many jobs running as the QOS allows",
    "QOSMaxCpuPerUserLimit": "you have as many CPUs in use as the QOS allows",
    "AssocGrpCpuLimit": "your account has as many CPUs in use as it may",
    "AssocMaxJobsLimit": "you have as many jobs running as your account allows",
    "JobHeldUser": "held by you: scontrol release JOB",
    "JobHeldAdmin": "held by an administrator",
    "launch failed requeued held": "held after failing to start; an administrator can tell why: scontrol release JOB",
}


def waiting_reason(reason: str) -> str:
    """Slurm's reason for waiting, in words; one that is not known here, as Slurm writes it (squeue(1), JOB REASON CODES)."""
    return WAITING.get(reason) or next((words for key, words in WAITING.items() if reason.startswith(key)), reason)


def read_done(folder: ElementDir) -> dict[str, Any] | None:
    """The marker of a finished element; a damaged one does not count."""
    done = read_object(folder.done)
    return done if isinstance(done.get("outputs"), dict) else None


def missing_output(done: dict[str, Any]) -> str | None:
    """What is no longer as the marker says; None where all outputs are there at their sizes."""
    for name, size in done["outputs"].items():
        try:
            found = os.stat(name)
        except OSError:
            return f"{name} is gone"
        if found.st_size != size:
            return f"{name} has {found.st_size} bytes instead of {size}"
    return None


def _end_of(lines: Sequence[dict[str, Any]], attempt: int) -> dict[str, Any] | None:
    return next(
        (line for line in reversed(lines) if line.get("event") == "end" and line.get("attempt") == attempt), None
    )


def read_stage(run: RunDir, stage: Stage) -> list[ElementState]:
    """All elements of a stage, as far as this machine's files and locks say: what the local executor goes by."""
    return [read_element(run, stage, element.name, element.title) for element in stage.elements]


def read_run(run: RunDir, plan: Plan, queue: Queue | None = None) -> list[ElementState]:
    """All elements of a run, in the order of the plan."""
    if queue is None:
        from amlaunch.launcher.slurm.queue import Queue

        queue = Queue()
    return read_runs([(run, plan)], queue)[0]


@dataclass(frozen=True)
class _Found:
    stage: str
    element: Element
    trace: Trace
    submitted: tuple[Submission, int] | None


def read_runs(runs: Iterable[tuple[RunDir, Plan]], queue: Queue) -> list[list[ElementState]]:
    """All elements of several runs, with one squeue and at most one sacct for all of them."""
    from amlaunch.launcher.runs.submissions import (
        submissions_of,  # here, like all that a list without runs can do without
    )

    pairs = [(run, plan, submissions_of(run, plan)) for run, plan in runs]
    if any(submissions for _, _, submitted in pairs for submissions in submitted.values()):
        _ = queue.jobs  # before the files: a job that ends in between has left its marker, not the other way round
    found = [list(_read_files(run, plan, submitted)) for run, plan, submitted in pairs]
    queue.ask_past(_unexplained([one for elements in found for one in elements], queue))
    return [_with_causes([_state(one, queue) for one in elements]) for elements in found]


def _with_causes(states: list[ElementState]) -> list[ElementState]:
    """Why Slurm cancelled what waited: it says the same whether the stage before failed, or was cancelled together with it."""
    if not any(state.reason == BEFORE for state in states):
        return states
    broken = {state.stage for state in states if state.state in (FAILED, DIED, UNKNOWN)}
    stopped = {state.stage for state in states if state.state == STOPPED}
    words: dict[str, str] = {}
    for stage in dict.fromkeys(state.stage for state in states):  # in the plan's order: what comes first was waited for
        earlier = words.keys()
        words[stage] = (
            BEFORE
            if broken & earlier
            else "a stage before it was stopped"
            if stopped & earlier
            else "cancelled before it started"
        )
    return [replace(state, reason=words[state.stage]) if state.reason == BEFORE else state for state in states]


def _read_files(run: RunDir, plan: Plan, submitted: dict[str, list[Submission]]) -> Iterable[_Found]:
    from amlaunch.launcher.runs.submissions import newest_jobs

    for stage in plan.stages:
        jobs = newest_jobs(submitted[stage.name])
        folder = run.stage(stage.name)
        there = set(os.listdir(folder)) if folder.is_dir() else set()
        for element in stage.elements:
            place = ElementDir(folder / element.name)
            yield _Found(
                stage.name,
                element,
                trace(place) if element.name in there else Trace(place, [], None, "", {}),
                jobs.get(element.name),
            )


def _unexplained(found: Iterable[_Found], queue: Queue) -> set[str]:
    """The arrays of jobs that left no marker and no word, and that the queue does not know (or cannot be asked about)."""
    arrays = set()
    for one in found:
        if (
            one.submitted is None
            or one.submitted[0].job is None
            or one.trace.done is not None
            or queue.is_elsewhere(one.submitted[0].slurm)
        ):
            continue
        submission, index = one.submitted
        job = submission.task(index)
        if job not in (queue.jobs or {}) and not _left_word(one.trace, job):
            arrays.add(submission.job or "")
    return arrays


def _state(one: _Found, queue: Queue) -> ElementState:
    if one.submitted is None or _taken_over(one):
        return _on_this_machine(one.stage, one.element.name, one.element.title, one.trace)
    return _on_slurm(one.stage, one.element.name, one.element.title, one.trace, *one.submitted, queue)


def _taken_over(one: _Found) -> bool:
    """Whether the newest attempt was made on this machine, after the job."""
    assert one.submitted is not None
    starts = one.trace.starts
    return bool(starts) and starts[-1]["time"] > one.submitted[0].time and "_" not in str(starts[-1].get("job"))


def is_driven(run: RunDir, states: Iterable[ElementState]) -> bool:
    """Whether the run goes on by itself: a launcher that is between two stages counts, and a job that waits in the queue."""
    return is_locked(run.lock) or any(state.state in ACTIVE for state in states)


def overall(states: Sequence[ElementState], driven: bool = False) -> State:
    """One word for many elements: the one that most wants attention; done only if all are."""
    found = {state.state for state in states}
    if driven:
        return QUEUED if QUEUED in found and RUNNING not in found else RUNNING
    if DONE in found and PENDING in found and not found & {FAILED, DIED, UNKNOWN, CANCELLED, *ACTIVE}:
        return STOPPED
    return next(state for state in SEVERITY if state in found) if found else PENDING
