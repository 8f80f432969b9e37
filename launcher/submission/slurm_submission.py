"""Submit job arrays so that no work is lost and none is done twice, even if the submitter is killed at any moment.

The folder of an array is written before sbatch is called, and completed once sbatch has answered. A submitter that is
killed in between leaves a token in the job's comment. The next submitter finds the job by this token
instead of submitting another.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from amlaunch.launcher.display import wording
from amlaunch.launcher.errors import SlurmError, SlurmNotInstalled, SlurmTimeout, is_no_answer
from amlaunch.launcher.runs.element_state import ElementState, read_run
from amlaunch.launcher.runs.states import ACTIVE_STATES, State
from amlaunch.launcher.runs.submissions import Submission, submissions_of
from amlaunch.launcher.slurm import client, sbatch
from amlaunch.launcher.slurm import queue as queue_module
from amlaunch.launcher.slurm.queue import Queue
from amlaunch.launcher.specs.cluster_profile import ClusterProfile
from amlaunch.launcher.specs.plan import Plan, Stage
from amlaunch.launcher.submission.array_drafts import (
    ArrayDraft,
    dependency_clauses,
    dependency_options,
    draft_arrays,
)
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import Lock, write_text
from amlaunch.recipes.output import counted
from amlaunch.recipes.run_layout import RunDir

REFUSAL = "Batch job submission failed"
MAX_CLOCK_DIFFERENCE_SECONDS = 120.0
"""Largest difference between the clocks of this host and the controller."""
FIND_JOB_SECONDS = (0.5, 1.0, 2.0, 4.0)
"""Pauses before each look for a job that sbatch may have submitted."""
LOCK_SECONDS = 60.0

Say = Callable[[str], None]


def submit_run(run: RunDir, plan: Plan, profile: ClusterProfile, stages: Sequence[Stage], say: Say) -> list[Submission]:
    """Submit the elements that are neither done nor active. Raises BadInput and SlurmError."""
    states = known_states(run, plan)
    submissions: list[Submission] = []
    jobs: dict[str, str] = {}
    try:
        drafts = draft_arrays(run, plan, profile, states, stages, client.max_array_size())
        for stage in stages:
            stage_drafts = [draft for draft in drafts if draft.array.stage is stage]
            submitted = {name for draft in stage_drafts for name in draft.array.elements}
            for line in skipped_lines(stage, states, submitted):
                say(line)
            for draft in stage_drafts:
                submission = _submit_array(draft, run, plan, jobs)
                jobs[draft.array.folder.name] = submission.job or ""
                submissions.append(submission)
                say(f"{stage.name}: submitted {counted(len(submission.elements), 'element')} as job {submission.job}")
    finally:
        queue_module.invalidate_cache()
    return submissions


def skipped_lines(stage: Stage, states: Sequence[ElementState], submitted: Container[str]) -> list[str]:
    """Describe the elements of a stage that are not submitted, because they are done or active."""
    skipped = [state for state in states if state.stage == stage.name and state.name not in submitted]
    done = sum(state.state == State.DONE for state in skipped)
    active = sum(state.state in ACTIVE_STATES for state in skipped)
    lines = []
    if done:
        lines.append(f"{stage.name}: {done} of {len(stage.elements)} already done, skipped")
    if active:
        lines.append(f"{stage.name}: {active} of {len(stage.elements)} already queued or running, left unchanged")
    return lines


def known_states(run: RunDir, plan: Plan) -> list[ElementState]:
    """Return the current states of all elements.

    Raises SlurmError if Slurm cannot tell: a guess could submit a job twice.
    """
    queue = Queue(max_age=0)
    states = read_run(run, plan, queue)
    # Without squeue, accounting alone may call a job active that has ended. (An unknown element without a job ID is
    # settled by recover.)
    unknown = next((state for state in states if state.job and _is_unknown(state, queue)), None)
    if unknown:
        reason = f"{'; '.join(queue.problems)}; try again once Slurm answers" if queue.problems else unknown.reason
        raise SlurmError("Slurm", f"the state of job {unknown.job} is unknown: {reason}")
    return states


def _is_unknown(state: ElementState, queue: Queue) -> bool:
    return state.state == State.UNKNOWN or (state.state in ACTIVE_STATES and queue.jobs is None)


def check_moved(run: RunDir, plan: Plan, cluster: str, states: Sequence[ElementState]) -> str:
    """Return a note if a run moves to another cluster, else an empty string. Raises BadInput if it is active there."""
    submissions = [
        submission
        for stage_submissions in submissions_of(run, plan).values()
        for submission in stage_submissions
        if submission.run == str(run.root)
    ]
    jobs_elsewhere = {
        job: submission
        for submission in submissions
        if submission.cluster != cluster
        for job in submission.tasks().values()
    }
    active = next((state for state in states if state.state in ACTIVE_STATES and state.job in jobs_elsewhere), None)
    if active:
        previous = jobs_elsewhere[active.job].cluster
        raise BadInput(
            f"{plan.run_id} is active on cluster {previous} ({active.stage} {active.name}: job {active.job}); "
            f"continue with --cluster {previous}, or stop it first: "
            f"{wording.program()} cancel {wording.name_of(run)} --checkpoint"
        )
    newest = max(submissions, key=lambda submission: submission.time, default=None)
    if newest is None or newest.cluster == cluster:
        return ""
    return f"{plan.run_id} moves from cluster {newest.cluster} to {cluster}; finished elements are kept"


@contextmanager
def submitting(run: RunDir, plan: Plan) -> Iterator[None]:
    """Allow one submitter at a time for a run, and for shards that runs share. Raises BadInput after a minute."""
    with ExitStack() as locks:
        for folder in ([Path(plan.shared)] if plan.shared else []) + [run.root]:
            lock = Lock(folder / "submit.lock")
            deadline = time.monotonic() + LOCK_SECONDS
            while not lock.acquire():
                if time.monotonic() > deadline:
                    raise BadInput(
                        f"another amlaunch process has been submitting in {folder} for a minute; try again later"
                    )
                time.sleep(0.2)
            locks.callback(lock.release)
        yield


def recover(run: RunDir, plan: Plan, say: Say) -> None:
    """Settle what an interrupted submitter began: adopt its jobs, and abandon submissions that never became a job.

    Raises SlurmError if Slurm does not answer: a guess could lose a job or submit it twice.
    """
    open_submissions = [
        submission
        for submissions in submissions_of(run, plan, strict=True).values()
        for submission in submissions
        if submission.job is None
    ]
    if not open_submissions:
        return

    cluster = client.cluster_name()
    elsewhere = next((one for one in open_submissions if one.slurm not in ("", cluster)), None)
    if elsewhere:
        raise SlurmError(
            "Slurm",
            f"a submit to cluster {elsewhere.slurm} was interrupted, and this is cluster {cluster}; "
            f"run the same command on {elsewhere.slurm} first",
        )
    jobs = _jobs_by_token(min(submission.time for submission in open_submissions))
    for submission in open_submissions:
        job = jobs.get(submission.token)
        if job:
            dataclasses.replace(submission, job=job).write()
            say(f"{submission.stage}: found job {job} of an interrupted submit and adopted it")
        else:
            # Its sbatch may still be running; a job that appears later finds that it was abandoned, and exits.
            dataclasses.replace(submission, abandoned=True).write()


def _jobs_by_token(since: float) -> dict[str, str]:
    """Return ``{token: array job ID}`` of all jobs submitted ``since`` then. A folder may have held an older run."""
    return {
        job.comment: job.id.split("_")[0]
        for job in client.squeue().values()
        if job.comment and job.submitted_at > since - MAX_CLOCK_DIFFERENCE_SECONDS
    }


def _submit_array(draft: ArrayDraft, run: RunDir, plan: Plan, jobs: dict[str, str]) -> Submission:
    """Submit one array. Raises BadInput if sbatch refuses it, SlurmError if the outcome is unknown."""
    array = draft.array
    write_text(array.folder / "script.sh", draft.script)
    cluster = plan.cluster or {}
    submission = Submission(
        folder=array.folder,
        stage=array.stage.name,
        elements=array.elements,
        run=str(run.root),
        cluster=str(cluster.get("name")),
        token=array.token,
        time=time.time(),
        after=tuple(dependency_clauses(draft, jobs)),
        inputs=draft.after.checked_stages,
        slurm=client.cluster_name(),
        needs=dataclasses.asdict(array.stage.needs),
        profile=dict(cluster.get("profile") or {}),
        env=plan.env,
        container=dataclasses.asdict(array.stage.container) if array.stage.container else None,
    )
    submission.write()
    if draft.replaced_jobs:
        client.scancel(draft.replaced_jobs)
    try:
        job = sbatch.submit(draft.script, dependency_options(draft, jobs))
    except SlurmError as error:
        job = _find_submitted_job(submission, error)
    submission = dataclasses.replace(submission, job=job)
    submission.write()
    return submission


def is_refusal(error: SlurmError) -> bool:
    """Return True if the controller itself refused a request; False if it may not have been reached."""
    if isinstance(error, (SlurmNotInstalled, SlurmTimeout)):
        return False
    return not is_no_answer(error.message)


def _find_submitted_job(submission: Submission, error: SlurmError) -> str:
    """Return the job of an sbatch that failed: it may be in the queue nevertheless.

    Raises BadInput if sbatch refused the job, and SlurmError if the outcome is unknown; the submission then stays open
    for :func:`recover`.
    """
    refused = REFUSAL in error.message and is_refusal(error)
    for seconds in (0.0,) if refused else FIND_JOB_SECONDS:
        time.sleep(seconds)
        try:
            job = _jobs_by_token(submission.time).get(submission.token)
        except SlurmError:
            continue
        if job:
            return job
    if refused:
        dataclasses.replace(submission, abandoned=True).write()
        raise BadInput(f"stage {submission.stage}: sbatch refused the job: {error.message}") from None
    raise SlurmError(
        "sbatch",
        f"{error.message}; Slurm may or may not have accepted stage {submission.stage}: "
        "run the same command again to find out",
    ) from None
