"""Run the GPU check as a run of one element, whose ranks are ``amlaunch.trainer.tools.gpu_check``.

The check is submitted, started, watched and explained by the same code as training, so that a node
that passes it also runs training.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amlaunch.launcher.display import wording
from amlaunch.launcher.display.findings import BAD, OK, Finding
from amlaunch.launcher.display.live_report import LiveReport, PlainReport
from amlaunch.launcher.doctor.diagnosis import smallest_job
from amlaunch.launcher.doctor.probe import SitePartition
from amlaunch.launcher.execution.local_executor import LocalExecutor
from amlaunch.launcher.runs.attempt_record import AttemptHistory
from amlaunch.launcher.runs.element_state import ElementState, read_run, read_stage
from amlaunch.launcher.runs.snapshot import take_snapshot
from amlaunch.launcher.runs.states import ACTIVE_STATES, State
from amlaunch.launcher.slurm import client
from amlaunch.launcher.slurm.queue import Queue
from amlaunch.launcher.specs.cluster_profile import Cluster
from amlaunch.launcher.specs.machine import this_machine
from amlaunch.launcher.specs.plan import Element, Needs, Plan, Stage
from amlaunch.launcher.submission.slurm_submission import submit_run
from amlaunch.recipes.files import Lock, write_json
from amlaunch.recipes.run_layout import RunDir

STAGE, ELEMENT = "train", "gpu-check"
CHECK_MINUTES = 10
SIGNAL_SECONDS = 60
"""Replaces the profile's signal_seconds, which may be as long as the whole check."""
CPU_RANKS = 2
"""Ranks on a machine without GPUs: the fewest that have something to reduce."""
POLL_SECONDS = 1.0
VISIBILITY_SECONDS = 40.0
"""A network file system may show another machine's file only after its cached folder listing expires."""

Report = PlainReport | LiveReport
CheckResult = tuple[Mapping[str, Any], list[Finding]]
"""The measurements, empty if there are none, and findings about the run itself."""


def check_here(runs: Path, report: Report) -> CheckResult:
    """Measure this machine, with a rank for each of its GPUs. Raises OSError."""
    machine = this_machine()
    gpus = len(machine.gpus)
    run, plan = _write_run(runs, Stage(STAGE, [], [], Needs(1, gpus, gpus or CPU_RANKS, machine.cpus)))

    # The ranks end when nobody holds the lock any more.
    lock = Lock(run.lock)
    lock.acquire()
    try:
        with report:
            LocalExecutor(run, plan, machine, report).execute(plan.stages)
    finally:
        lock.release()
    [state] = read_stage(run, plan.stage(STAGE))
    return _result(run, state, report)


def check_node(cluster: Cluster, partitions: Sequence[SitePartition], runs: Path, report: Report) -> CheckResult:
    """Measure a node of the partition that the profile uses for training; Ctrl-C cancels the job.

    Raises BadInput, SlurmError and OSError.
    """
    stage = smallest_job(cluster, partitions, STAGE)
    if not stage.needs.gpus_per_node:
        text = f"no job was submitted: the nodes of partition {stage.partition} have no GPUs"
        advice = "name a partition with GPUs in the profile: stages: {train: {partition: NAME}}"
        return {}, [Finding("job", BAD, text, advice)]

    run, plan = _write_run(runs, stage, {"name": cluster.name, "profile": dict(cluster.tree)})
    profile = dataclasses.replace(cluster.profile, signal_seconds=SIGNAL_SECONDS)
    [submission] = submit_run(run, plan, profile, plan.stages, report.say)
    try:
        with report:
            state = _wait(run, plan, report)
    except KeyboardInterrupt:
        client.scancel([str(submission.job)])
        report.say(f"job {submission.job} cancelled")
        raise

    measured, findings = _result(run, state, report)
    if measured:
        text = f"{state.nodes or state.host} wrote to {run.root}, and this machine can read it"
        findings = [Finding("shared", OK, text)]
    return measured, findings


def _write_run(runs: Path, stage: Stage, cluster: dict[str, Any] | None = None) -> tuple[RunDir, Plan]:
    """Create a run directory in ``doctor/``, where ``status`` does not list it."""
    run = RunDir(runs / "doctor" / time.strftime(f"{ELEMENT}-%Y-%m-%dT%H-%M-%S"))
    result = run.element(STAGE, ELEMENT).result
    element = Element(ELEMENT, "amlaunch.trainer.tools.gpu_check", ["--out", str(result)])
    needs = dataclasses.replace(stage.needs, time_minutes=CHECK_MINUTES, hang_seconds=60.0 * CHECK_MINUTES)
    stage = dataclasses.replace(stage, elements=[element], needs=needs)
    plan = Plan(run.root.name, [stage], data=None, cwd=str(run.root), cluster=cluster)
    take_snapshot(run.code, None)
    write_json(run.plan, plan.to_json())
    return run, plan


def _wait(run: RunDir, plan: Plan, report: Report) -> ElementState:
    """Wait until the element has ended and its files are visible here; return its state."""
    deadline = time.monotonic() + VISIBILITY_SECONDS
    while True:
        [state] = read_run(run, plan, Queue())
        report([state])
        if state.state in (*ACTIVE_STATES, State.UNKNOWN):
            deadline = time.monotonic() + VISIBILITY_SECONDS
        elif state.state not in (State.FAILED, State.DIED) or _has_end(run) or time.monotonic() > deadline:
            return state
        time.sleep(POLL_SECONDS)


def _has_end(run: RunDir) -> bool:
    """Return True if the driver's record of the attempt's end is visible."""
    return bool(AttemptHistory.read(run.element(STAGE, ELEMENT).attempts).ends)


def _result(run: RunDir, state: ElementState, report: Report) -> CheckResult:
    """Return the measurements, or a finding that explains why there are none."""
    if state.state == State.DONE:
        return state.result, []

    log = run.element(STAGE, ELEMENT).log(state.attempts, state.rank or 0)
    if state.log and not log.exists():
        log = state.log
    lines = wording.last_lines(log)
    if state.state in (State.FAILED, State.DIED) and state.job and not lines:
        text = f"no output of the job is visible in {run.root}: the node does not see this folder ({state.reason})"
        advice = "choose a folder that all nodes see under the same path: set runs in the profile, or AMLAUNCH_RUNS"
        return {}, [Finding("shared", BAD, text, advice)]

    if lines:
        report.say("\n".join([f"last lines of {log}:", *(f"  | {line}" for line in lines)]))
    text = f"the check {state.state} on {state.host or 'the node'}: {state.reason}"
    advice = (
        "if torch is missing: load a module in the profile's setup, or set python to another Python; "
        "on this machine, run pip install 'amlaunch[train]'"
    )
    return {}, [Finding("job", BAD, text, advice)]
