"""Explain the states and reasons that Slurm reports for a job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from amlaunch.launcher.runs.states import State

if TYPE_CHECKING:
    from amlaunch.launcher.slurm.client import JobInfo

PREDECESSOR_FAILED = "an earlier stage did not finish"
NEVER_STARTED = "cancelled before it started"

END_REASONS = {
    "TIMEOUT": "reached its time limit before it had saved; raise time in resources, or checkpoint more often",
    "NODE_FAIL": "failed with its node",
    "OUT_OF_MEMORY": "ran out of memory",
    "BOOT_FAIL": "failed because its node did not boot",
    "DEADLINE": "missed its deadline",
    "PREEMPTED": "was preempted and not requeued",
    "REVOKED": "was revoked by another cluster",
}
"""Explanations of Slurm's job states (squeue(1), JOB STATE CODES)."""

PENDING_REASONS = {
    "Priority": "waiting behind jobs with a higher priority",
    "Resources": "waiting for free nodes",
    "Dependency": "waiting for the stage before it",
    "DependencyNeverSatisfied": "will not start: an earlier stage failed",
    "BeginTime": "requeued, starts again in a moment",
    "JobArrayTaskLimit": "waiting for other elements of the stage (throttle)",
    "PartitionDown": "its partition is down",
    "PartitionInactive": "its partition is inactive",
    "PartitionTimeLimit": "requests more time than its partition allows",
    "PartitionNodeLimit": "requests more nodes than its partition allows",
    "ReqNodeNotAvail": "the requested nodes are not available",
    "NodeDown": "a required node is down",
    "Licenses": "waiting for a licence",
    "Reservation": "waiting for its reservation",
    "AssocGrpGRES": "your account has reached its GPU limit",
    "QOSMaxGRESPerUser": "you have reached the GPU limit of your QOS",
    "QOSMaxJobsPerUserLimit": "you have reached the job limit of your QOS",
    "QOSMaxCpuPerUserLimit": "you have reached the CPU limit of your QOS",
    "AssocGrpCpuLimit": "your account has reached its CPU limit",
    "AssocMaxJobsLimit": "your account has reached its job limit",
    "JobHeldUser": "held by you; release it: scontrol release JOB",
    "JobHeldAdmin": "held by an administrator",
    "launch failed requeued held": "held after failing to start; ask an administrator, then: scontrol release JOB",
}
"""Explanations of Slurm's reasons for a pending job (squeue(1), JOB REASON CODES)."""


def pending_reason(reason: str) -> str:
    """Explain why a job is pending; a reason that is not known here is returned as Slurm writes it."""
    if reason in PENDING_REASONS:
        return PENDING_REASONS[reason]
    return next((text for code, text in PENDING_REASONS.items() if reason.startswith(code)), reason)


@dataclass(frozen=True)
class JobEnd:
    """The end of a job whose driver recorded none, according to Slurm."""

    state: State
    reason: str
    kind: str = ""
    """The kind of failure that the reason names (failure_causes)."""
    dependency_failed: bool = False
    """True if Slurm cancelled the job because a job that it depended on did not succeed."""


def explain_end(info: JobInfo, *, started: bool) -> JobEnd:
    """Explain how a job ended from Slurm's record of it; ``started``: the element has had an attempt."""
    if info.state == "CANCELLED":
        return _explain_cancellation(info, started)
    job = f"job {info.id} on {info.nodes}" if info.nodes else f"job {info.id}"
    if info.state in END_REASONS:
        kind = "out of memory" if info.state == "OUT_OF_MEMORY" else ""
        return JobEnd(State.FAILED, f"{job} {END_REASONS[info.state]}", kind)
    code = f", exit code {info.exit_code}" if info.exit_code else ""
    return JobEnd(State.FAILED, f"{job} ended ({info.state}{code}) before its driver recorded a result")


def _explain_cancellation(info: JobInfo, started: bool) -> JobEnd:
    if "Dependency" in info.reason:
        return JobEnd(State.CANCELLED, PREDECESSOR_FAILED, dependency_failed=True)
    if not started and not info.nodes:
        return JobEnd(State.CANCELLED, NEVER_STARTED)
    return JobEnd(State.CANCELLED, "cancelled")
