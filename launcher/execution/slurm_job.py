"""Run the driver of one element in a Slurm job: ``python -m amlaunch.launcher.execution.slurm_job RUN SUBMISSION``.

It is the batch script's own process on the job's first node, so Slurm's warning of the time limit reaches it. It
decides whether the job is done, goes back into the queue, or fails.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

EARLY_SIGNALS: list[int] = []
"""Signals received before the driver could handle them: Python takes a moment to start, and USR1 would end it."""

for _number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(_number, lambda number, _: EARLY_SIGNALS.append(number))

# The signal handlers above come before all other imports.
from amlaunch.launcher.execution.attempt import Assignment  # noqa: E402
from amlaunch.launcher.execution.driver import run_element  # noqa: E402
from amlaunch.launcher.execution.srun_step import SrunStep  # noqa: E402
from amlaunch.launcher.execution.stage_inputs import missing_input  # noqa: E402
from amlaunch.launcher.execution.stop_request import SPARE_SECONDS  # noqa: E402
from amlaunch.launcher.runs.attempt_record import (  # noqa: E402
    AttemptEnd,
    AttemptHistory,
    AttemptStart,
    append_attempt,
)
from amlaunch.launcher.runs.find import read_plan  # noqa: E402
from amlaunch.launcher.runs.states import Outcome  # noqa: E402
from amlaunch.launcher.runs.submissions import Submission, read_submission  # noqa: E402
from amlaunch.launcher.slurm import client  # noqa: E402
from amlaunch.launcher.specs.cluster_profile import ClusterProfile, check_profile  # noqa: E402
from amlaunch.launcher.specs.plan import Needs, Plan, stage_container_from_json  # noqa: E402
from amlaunch.recipes.errors import BAD_INPUT, FAILED, OK, RESUMABLE, BadInput  # noqa: E402
from amlaunch.recipes.files import Lock, read_object  # noqa: E402
from amlaunch.recipes.run_layout import ElementDir, RunDir  # noqa: E402

REQUEUE_TRIES = 8
LOCK_SECONDS = 180.0
"""Time to wait for the element's lock: a crashed host's lock on NFS lives for the server's lease, 90 s by default."""
MIN_GRACE_SECONDS = 30.0
"""Ranks may save from the warning until SPARE_SECONDS before the time limit, and for at least this long."""
REQUEUE_SECONDS = 120.0
"""Time for Slurm to end a job that it has put back into the queue."""


def main(arguments: Sequence[str]) -> int:
    """Run the element that this array task stands for; return the exit code of the job."""
    run, folder = RunDir(Path(arguments[0])), Path(arguments[1])
    os.environ.update({name: str(value) for name, value in read_object(run.environment).items()})
    try:
        submission = own_submission(folder)
        plan = read_plan(run)
        profile = check_profile(submission.profile if submission else {}, {})
    except (BadInput, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    if submission is None:
        print(f"Stale job: {folder} records another job ID. Exiting without running.")
        return RESUMABLE
    return _run_submitted(run, plan, profile, submission)


def _run_submitted(run: RunDir, plan: Plan, profile: ClusterProfile, submission: Submission) -> int:
    element = submission.elements[int(os.environ["SLURM_ARRAY_TASK_ID"])]
    element_dir = run.element(submission.stage, element)
    # The stage as submitted: the plan may have been changed while the job waited.
    needs = Needs(**submission.needs)
    plan = with_needs(plan, submission, needs)
    problem = missing_input(run, plan, submission, element)
    if problem:
        return cancel_attempt(element_dir, problem)
    step = SrunStep(profile)
    assignment = _assignment(needs, profile.signal_seconds)
    outcome = run_element(str(run.root), submission.stage, element, assignment, step, EARLY_SIGNALS, plan)
    excluded_nodes = str(profile.stage(submission.stage).sbatch.get("exclude", ""))
    return finish_job(element_dir, outcome, needs, excluded_nodes)


def _assignment(needs: Needs, signal_seconds: int) -> Assignment:
    return Assignment(
        cpus=needs.cpus,
        gpus=tuple(map(str, range(needs.gpus_per_node))),
        job=job_id(),
        budget=job_id(),
        port_seed=int(os.environ["SLURM_JOB_ID"]),
        grace_seconds=max(MIN_GRACE_SECONDS, signal_seconds - SPARE_SECONDS),
        job_end=float(os.environ.get("SLURM_JOB_END_TIME", "0")) or None,
        lock_seconds=LOCK_SECONDS,
        total_gpus=needs.nodes * needs.gpus_per_node,
        nodes=os.environ.get("SLURM_JOB_NODELIST", ""),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )


def with_needs(plan: Plan, submission: Submission, needs: Needs) -> Plan:
    """Return the plan with what the job was submitted with: resources, container and environment of its stage."""
    container = stage_container_from_json(submission.container)
    stages = [
        dataclasses.replace(stage, needs=needs, container=container) if stage.name == submission.stage else stage
        for stage in plan.stages
    ]
    return dataclasses.replace(plan, stages=stages, env=submission.env)


def own_submission(folder: Path) -> Submission | None:
    """Return this job's submission; None if another job is recorded for it.

    A submitter that was killed before sbatch answered has recorded no job ID; then the job records its own. So a job
    without a record finds its work, and of two jobs for the same work only one does it.
    """
    submission = read_submission(folder)
    own_id = os.environ["SLURM_ARRAY_JOB_ID"]
    if submission.abandoned:
        return None
    if submission.job is None:
        submission = dataclasses.replace(submission, job=own_id)
        submission.write()
    return submission if submission.job == own_id else None


def job_id() -> str:
    """Return the ID of this array task. A requeue must never name the array, whose ID the last task shares."""
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def cancel_attempt(folder: ElementDir, reason: str) -> int:
    """Record why the element was not run; return an exit code with which dependent jobs never start."""
    lock = Lock(folder.lock)
    # Otherwise another driver runs the element all the same.
    if lock.acquire():
        number = AttemptHistory.read(folder.attempts).next_number
        host = os.environ.get("SLURMD_NODENAME", "")
        append_attempt(folder.attempts, AttemptStart(number, host=host, job=job_id(), budget=job_id()))
        append_attempt(folder.attempts, AttemptEnd(Outcome.CANCELLED, reason, attempt=number))
        lock.release()
    print(reason, flush=True)
    return FAILED


def finish_job(folder: ElementDir, outcome: Outcome, needs: Needs, excluded_nodes: str) -> int:
    """Requeue the job if the driver's record says so; otherwise return its exit code."""
    history = AttemptHistory.read(folder.attempts)
    end = history.newest_end
    reason = f": {end.reason}" if end and end.reason else ""
    print(f"{folder.root.parent.name} {folder.root.name}: {outcome}{reason}", flush=True)
    if outcome == Outcome.DONE:
        return OK
    if outcome == Outcome.LOCKED:
        return _leave_locked(history)
    if end is not None and end.restart:
        problem = requeue(nodes_to_exclude(history, needs, excluded_nodes))
        append_attempt(folder.attempts, _not_requeued(end, problem))
    if outcome == Outcome.STOPPED:
        return RESUMABLE
    return FAILED if end is None or end.retryable else BAD_INPUT


def _leave_locked(history: AttemptHistory) -> int:
    """Exit without running the element: another job has it, or a crashed node still holds the lock for this job."""
    print(f"another driver has held this element's lock for {LOCK_SECONDS:.0f} s; exiting", flush=True)
    newest = history.newest_start
    if newest is not None and newest.job == job_id():
        requeue(None)
    return RESUMABLE


@dataclasses.dataclass(frozen=True)
class RequeueProblem:
    """The reason why Slurm did not requeue this job."""

    message: str = ""
    job_cancelled: bool = False
    """True if the job was cancelled, or requeued by Slurm itself."""


def _not_requeued(end: AttemptEnd, problem: RequeueProblem) -> AttemptEnd:
    end = dataclasses.replace(end, time=time.time(), restart=False)
    if problem.job_cancelled:
        reason = "ended from outside (cancelled, or requeued by Slurm); saved progress is kept"
        return dataclasses.replace(end, outcome=Outcome.CANCELLED, reason=reason)
    return dataclasses.replace(end, reason=f"{end.reason}; not requeued: {problem.message}")


def nodes_to_exclude(history: AttemptHistory, needs: Needs, excluded_nodes: str) -> str | None:
    """Return the nodes that the next attempt avoids: the profile's and failed ones; None if nothing changes."""
    failed = history.hosts_to_avoid()
    if _partition_nodes() - len(failed) < needs.nodes:
        # Too few nodes would remain.
        failed = []
    # An earlier exclusion may have expired, and must then be replaced.
    has_list = failed or any(end.avoid_host for end in history.ends)
    return ",".join(filter(None, [excluded_nodes, *failed])) if has_list else None


def _partition_nodes() -> int:
    """Return the number of nodes in this job's partition; 0 if Slurm does not answer."""
    try:
        partitions = client.partitions()
    except client.SlurmError:
        return 0
    return next((part.nodes for part in partitions if part.name == os.environ.get("SLURM_JOB_PARTITION")), 0)


def requeue(excluded_nodes: str | None) -> RequeueProblem:
    """Requeue this task, to start on none of the excluded nodes, and wait for Slurm to end it.

    Returns only if that fails. A job that was cancelled stays cancelled: its ranks were asked to stop, too, and looked
    just like preempted ones.
    """
    # Slurm now sends SIGTERM to all processes of the job, which would kill scontrol below.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    problem = RequeueProblem()
    for attempt in range(REQUEUE_TRIES):
        try:
            if not client.may_be_requeued(job_id()):
                return RequeueProblem(job_cancelled=True)
            client.requeue(job_id())
            if excluded_nodes is not None:
                _exclude(excluded_nodes)
        except client.SlurmError as error:
            # The controller restarts, or is busy.
            problem = RequeueProblem(str(error))
            time.sleep(min(2.0**attempt, 30.0))
            continue
        # Slurm ends this process here.
        time.sleep(REQUEUE_SECONDS)
        return RequeueProblem("Slurm accepted the requeue but did not end the job")
    return problem


def _exclude(nodes: str) -> None:
    """Exclude nodes from the next start; only pending jobs accept that, and this one is pending from its requeue on."""
    try:
        client.exclude(job_id(), nodes)
    except client.SlurmError as error:
        # It may fail on the same node once more; the retry limit ends that.
        print(f"could not exclude {nodes}: {error}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
