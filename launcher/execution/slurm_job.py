"""``python -m amlaunch.launcher.execution.slurm_job RUN ARRAY``: what a job of Slurm runs on its first node: the driver of one element.

It is the batch script's own process, so Slurm's warning of the time limit
reaches it. It decides how the job goes on: done, back into the queue, or over.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EARLY: list[int] = []
"""Signals that came before the driver could listen: Python takes a moment to start, and USR1 would end it."""

for _number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(_number, lambda number, _: EARLY.append(number))

from amlaunch.launcher.execution.attempt import Assignment  # noqa: E402
from amlaunch.launcher.execution.driver import SPARE_SECONDS, run_element  # noqa: E402
from amlaunch.launcher.execution.srun_step import Step  # noqa: E402
from amlaunch.launcher.execution.stage_inputs import missing_input  # noqa: E402
from amlaunch.launcher.runs.failure_causes import nodes_to_avoid  # noqa: E402
from amlaunch.launcher.runs.find import read_plan  # noqa: E402
from amlaunch.launcher.runs.states import State  # noqa: E402
from amlaunch.launcher.runs.submissions import Submission, read_submission  # noqa: E402
from amlaunch.launcher.slurm import client  # noqa: E402  (the handlers above come first)
from amlaunch.launcher.specs.cluster_profile import check_profile  # noqa: E402
from amlaunch.launcher.specs.plan import Needs, Plan, stage_container_from_json  # noqa: E402
from amlaunch.recipes.errors import BAD_INPUT, FAILED, OK, RESUMABLE, BadInput  # noqa: E402
from amlaunch.recipes.files import Lock, append_json_line, read_json_lines, read_object  # noqa: E402
from amlaunch.recipes.run_layout import ElementDir, RunDir  # noqa: E402

REQUEUE_TRIES = 8
LOCK_SECONDS = 180.0
"""How long to wait for the element's lock: a crashed host's lock on NFS lives for the server's lease, 90 s by default."""
MIN_GRACE = 30.0
"""Ranks have from the warning to SPARE_SECONDS before the time limit to save, and never less than this."""
LEAVE_SECONDS = 120.0
"""How long Slurm may take to end a job that it has put back into the queue."""


def main(arguments: Sequence[str]) -> int:
    """Carry out the element that this task of the array stands for; the exit code of the job."""
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
        print(
            f"this job is not the one that {folder} speaks of: another submit took its place; it leaves the element alone"
        )
        return RESUMABLE
    element = submission.elements[int(os.environ["SLURM_ARRAY_TASK_ID"])]
    needs = Needs(**submission.needs)  # what Slurm was asked for; the plan may have been changed while the job waited
    plan = with_needs(plan, submission, needs)
    missing = missing_input(run, plan, submission)
    if missing:
        return leave(run.element(submission.stage, element), missing)
    step = Step(profile)
    given = Assignment(
        cpus=needs.cpus,
        gpus=tuple(map(str, range(needs.gpus_per_node))),
        job=job_id(),
        budget=job_id(),
        port_seed=int(os.environ["SLURM_JOB_ID"]),
        grace=max(MIN_GRACE, profile.signal_seconds - SPARE_SECONDS),
        ends=float(os.environ.get("SLURM_JOB_END_TIME", "0")) or None,
        patience=LOCK_SECONDS,
        facts={"nodes": os.environ.get("SLURM_JOB_NODELIST", ""), "restarts": int(os.environ.get("SLURM_RESTART_COUNT", "0")), "gpus": needs.nodes * needs.gpus_per_node},
    )  # fmt: skip
    outcome = run_element(
        str(run.root),
        submission.stage,
        element,
        given,
        step.start,
        step.explain,
        told=EARLY,
        plan=plan,
        check=step.check,
    )
    excluded = str(profile.stage(submission.stage).sbatch.get("exclude", ""))
    return go_on(run.element(submission.stage, element), outcome, needs, excluded)


def with_needs(plan: Plan, submission: Submission, needs: Needs) -> Plan:
    """The plan as it was when the job was submitted, as far as that is the job's business."""
    container = stage_container_from_json(submission.container)
    stages = [
        dataclasses.replace(stage, needs=needs, container=container) if stage.name == submission.stage else stage
        for stage in plan.stages
    ]
    return dataclasses.replace(plan, stages=stages, env=submission.env)


def own_submission(folder: Path) -> Submission | None:
    """What this job was submitted for; None where another job is on record for it.

    A submitter that was killed before sbatch answered has left no number: the
    job writes down its own. So a job that nobody knows of finds its work, and of
    two that were submitted for the same work only one does it.
    """
    submission = read_submission(folder)
    mine = os.environ["SLURM_ARRAY_JOB_ID"]
    if submission.abandoned:
        return None
    if submission.job is None:
        submission = dataclasses.replace(submission, job=mine)
        submission.write()
    return submission if submission.job == mine else None


def leave(folder: ElementDir, reason: str) -> int:
    """Say why the element was not begun; the exit code of the job, with which what waits for it never starts."""
    lock = Lock(folder.lock)
    if lock.acquire():  # else somebody makes it all the same, and has the word
        lines = read_json_lines(folder.attempts)
        begun = {"attempt": 1 + sum(line.get("event") == "start" for line in lines), "time": time.time()}
        append_json_line(
            folder.attempts,
            {
                "event": "start",
                **begun,
                "job": job_id(),
                "budget": job_id(),
                "host": os.environ.get("SLURMD_NODENAME", ""),
            },
        )
        append_json_line(
            folder.attempts, {"event": "end", **begun, "outcome": State.CANCELLED, "reason": reason, "retry": True}
        )
        lock.release()
    print(reason, flush=True)
    return FAILED


def job_id() -> str:
    """Of this task of the array: a requeue must never name the whole array, whose number the last task has for its own, too."""
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def go_on(folder: ElementDir, outcome: str, needs: Needs, excluded: str) -> int:
    """Back into the queue where the driver's own record says so; the exit code otherwise."""
    lines = read_json_lines(folder.attempts)
    end: dict[str, Any] = next((line for line in reversed(lines) if line.get("event") == "end"), {})
    print(
        f"{folder.root.parent.name} {folder.root.name}: {outcome}{': ' + end['reason'] if end.get('reason') else ''}",
        flush=True,
    )
    if outcome == State.DONE:
        return OK
    if outcome == State.PENDING:
        return _leave_alone(lines)
    if end.get("again"):
        problem = back_into_the_queue(nodes_to_exclude(lines, needs, excluded))
        append_json_line(folder.attempts, {**end, "time": time.time(), "again": False, **_not_requeued(end, problem)})
    if outcome == State.STOPPED:
        return RESUMABLE
    return FAILED if end.get("retry", True) else BAD_INPUT


def _leave_alone(lines: Sequence[Mapping[str, Any]]) -> int:
    """The element's lock is held: by another job, which then has it, or still in the name of a crashed node that had this one."""
    newest: Mapping[str, Any] = next((line for line in reversed(lines) if line.get("event") == "start"), {})
    print(f"somebody has had this element for {LOCK_SECONDS:.0f} s", flush=True)
    if newest.get("job") == job_id():
        back_into_the_queue(None)
    return RESUMABLE


def _not_requeued(end: Mapping[str, Any], problem: str) -> dict[str, Any]:
    if problem == State.CANCELLED:
        return {
            "outcome": State.CANCELLED,
            "reason": "ended from outside (cancelled, or requeued by Slurm itself); what was saved is there",
        }
    return {"reason": f"{end['reason']}; not requeued: {problem}"}


def nodes_to_exclude(lines: Sequence[Mapping[str, Any]], needs: Needs, excluded: str) -> str | None:
    """The nodes that the next try keeps away from: the profile's and those that failed; None where nothing has to be changed."""
    bad = nodes_to_avoid(lines)
    try:
        here = next(
            (part.nodes for part in client.partitions() if part.name == os.environ.get("SLURM_JOB_PARTITION")), 0
        )
    except client.SlurmError:
        here = 0
    if here - len(bad) < needs.nodes:
        bad = []  # too few would be left to start at all
    changed = bad or any(line.get("elsewhere") for line in lines)  # an older list has run out
    return ",".join(filter(None, [excluded, *bad])) if changed else None


def back_into_the_queue(excluded: str | None) -> str:
    """Requeue this task, to start on none of the nodes ``excluded``, and wait for Slurm to end it; why not, where that cannot be.

    A job that was cancelled stays cancelled: its ranks were told to end, too,
    and looked just like preempted ones.
    """
    signal.signal(
        signal.SIGTERM, signal.SIG_IGN
    )  # which Slurm now sends to all of the job, and scontrol below would die of
    for attempt in range(REQUEUE_TRIES):
        try:
            if not client.may_be_requeued(job_id()):
                return State.CANCELLED
            client.requeue(job_id())
            if excluded is not None:
                _exclude(excluded)
        except client.SlurmError as error:  # the controller restarts, or is busy
            problem = str(error)
            time.sleep(min(2.0**attempt, 30.0))
            continue
        time.sleep(LEAVE_SECONDS)  # Slurm ends us here
        return "Slurm accepted it and let the job run on"
    return problem


def _exclude(nodes: str) -> None:
    """Only a job that waits can be given a list of nodes; this one waits from the moment of its requeue, while it still ends."""
    try:
        client.exclude(job_id(), nodes)
    except client.SlurmError as error:  # it may start on the same node once more; the budget of tries has the last word
        print(f"could not exclude {nodes}: {error}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
