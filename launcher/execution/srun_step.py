"""Start an element's ranks in a Slurm job as one ``srun`` step, and read from its output which rank failed where.

Behaviour of srun on signals, as observed on Slurm 22.05: SIGTERM to srun kills the tasks at once ("forcing job
termination"); SIGUSR1 is forwarded to all of them.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from amlaunch.launcher.execution.attempt import Assignment, Attempt
from amlaunch.launcher.execution.rank_processes import (
    RankProcess,
    RankStart,
    check_command,
    check_environment,
    create_folders,
    rank_start,
)
from amlaunch.launcher.execution.rank_wait import Processes
from amlaunch.launcher.execution.rendezvous import job_rendezvous
from amlaunch.launcher.planning.container_start import node_runtime
from amlaunch.launcher.runs.attempt_record import AttemptEnd
from amlaunch.launcher.slurm.client import expand_ranges
from amlaunch.launcher.specs.cluster_profile import ClusterProfile
from amlaunch.launcher.specs.plan import Needs, Plan, Stage
from amlaunch.recipes.errors import BAD_INPUT, RESUMABLE, BadInput
from amlaunch.recipes.files import Lock
from amlaunch.recipes.format.placeholders import UnsetVariable, expand_text, variables
from amlaunch.recipes.run_layout import RunDir

TASK_ERROR = re.compile(r"srun: error: (?P<host>[^\s:]+): tasks? (?P<ranks>[\d,\-]+): (?P<problem>.+)")
"""srun's message about tasks that did not exit with 0."""
EXIT_CODE = re.compile(r"Exited with exit code (\d+)")
KILLED = ("Killed", "Out Of Memory")
"""srun's words for a task that was killed, perhaps for lack of memory."""
ENDED_BY_SRUN = ("Killed", "Terminated")
"""srun's words for a task that it ended itself."""


class SrunStep:
    """Starts the ranks of an attempt as a step of the current Slurm job."""

    def __init__(self, profile: ClusterProfile):
        self.profile = profile

    def start(self, attempt: Attempt, files: ExitStack, port: int) -> Processes:
        """Start the srun that stands for all ranks and writes a log for each.

        Raises OSError, UnsetVariable and CannotLaunch.
        """
        nodes = attempt.stage.needs.nodes
        address = job_rendezvous(nodes, self.profile.interface, os.environ)
        command, start = self.command(attempt, {**address, "MASTER_PORT": str(port)})
        create_folders(attempt, start)
        stdin = subprocess.PIPE if start.launch.stdin else subprocess.DEVNULL
        # srun creates a rank's log when it starts the rank; the driver's log gets srun's earlier output.
        output = files.enter_context(open(attempt.log(None), "ab"))
        return [
            SrunProcess(
                command,
                ignores_signals=start.launch.ignores_signals,
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=start.env,
            )
        ]

    def command(self, attempt: Attempt, rendezvous: Mapping[str, str]) -> tuple[list[str], RankStart]:
        """Return the step's argv, and the ranks that it starts. Writes nothing.

        Raises OSError, UnsetVariable and CannotLaunch.
        """
        start = rank_start(attempt, self._environment(), rendezvous, on_slurm=True)
        log = attempt.folder.log(attempt.number, 0)
        srun = srun_command(attempt.stage.needs, log, self.profile.srun, attempt.plan.cwd, start)
        return [*srun, *start.launch.argv], start

    def check_nodes(self, attempt: Attempt, files: ExitStack) -> Processes:
        """Start a step that checks every node before containers start there; empty without a container."""
        start = rank_start(attempt, self._environment(), {}, on_slurm=True)
        create_folders(attempt, start)
        check = check_command(attempt, start, self.profile.python)
        if not check:
            return []
        nodes = attempt.stage.needs.nodes
        srun = [
            "srun",
            f"--nodes={nodes}",
            f"--ntasks={nodes}",
            "--ntasks-per-node=1",
            "--mpi=none",
            "--input=none",
            "--unbuffered",
            "--wait=0",
            *self.profile.srun,
        ]
        output = files.enter_context(open(attempt.log(None), "ab"))
        env = check_environment(attempt)
        return [
            SrunProcess([*srun, *check], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env)
        ]

    def _environment(self) -> dict[str, str]:
        return {key: expand_text(value, variables()) for key, value in self.profile.env.items()}

    def own_codes(self, attempt: Attempt, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Return 75 for srun's own exit code if the first rank that ended had saved, and srun killed the others.

        It does that to every rank that remains when one ends with a code other than 0 (--kill-on-bad-exit), and a rank
        ends with 75 only when all have saved.
        """
        ends = task_ends(attempt.log(None))
        is_saved = bool(ends) and ends[0].exit_code == RESUMABLE
        others_killed = all(end.exit_code == RESUMABLE or end.problem.startswith(ENDED_BY_SRUN) for end in ends)
        return (RESUMABLE,) if is_saved and others_killed else codes

    def explain(self, attempt: Attempt, end: AttemptEnd) -> AttemptEnd:
        """Name the rank and the host that failed first, from srun's own messages."""
        if not end.is_unexplained:
            return end
        log = attempt.log(None)
        failure = first_failure(log)
        if failure is None:
            return replace(end, reason=_step_failure(log, end), killed=False)
        end = replace(end, rank=failure.rank, host=failure.host)
        if failure.exit_code is None:
            reason = f"rank {failure.rank} ended: {failure.problem}"
            return replace(end, reason=reason, restart=True, killed=failure.problem.startswith(KILLED))
        reason = f"rank {failure.rank} exited with code {failure.exit_code}"
        retryable = failure.exit_code != BAD_INPUT
        # srun's own exit code may be that of a sibling that it killed.
        codes = (failure.exit_code,)
        return replace(end, reason=reason, restart=False, killed=False, retryable=retryable, exit_codes=codes)


class SrunProcess(RankProcess):
    """srun as the driver's only "rank": a request to stop becomes the signal that srun forwards to its tasks."""

    def send_signal(self, sig: int) -> None:
        """Send SIGUSR1 ("save and stop") instead of SIGTERM, with which srun would kill the tasks."""
        super().send_signal(signal.SIGUSR1 if sig == signal.SIGTERM else sig)


def srun_command(needs: Needs, log: Path, extra: list[str], cwd: str, start: RankStart) -> list[str]:
    """Return srun's part of the step: all ranks of the element, each with its own log beside ``log``.

    Ranks in a container meet without MPI's servers, whatever the site starts by default. A container of a daemon lives
    as long as its standard input. Tasks and CPUs are repeated because srun has not taken ``cpus-per-task`` from sbatch
    since Slurm 22.05.
    """
    pattern = str(log.parent).replace("%", "%%") + "/" + log.name.replace("rank0", "rank%t")
    return [
        "srun",
        f"--nodes={needs.nodes}",
        f"--ntasks={needs.nodes * needs.tasks_per_node}",
        f"--ntasks-per-node={needs.tasks_per_node}",
        f"--cpus-per-task={max(1, needs.cpus // needs.tasks_per_node)}",
        "--kill-on-bad-exit=1",
        "--wait=60",
        "--unbuffered",
        f"--input={'all' if start.launch.stdin else 'none'}",
        "--open-mode=append",
        f"--output={pattern}",
        f"--chdir={cwd}",
        *(["--mpi=none"] if start.spec else []),
        *extra,
        *start.launch.srun,
    ]


@dataclass(frozen=True)
class TaskFailure:
    """A task that srun saw fail."""

    host: str
    rank: int
    problem: str
    """srun's own words."""

    @property
    def exit_code(self) -> int | None:
        """The task's exit code; None if a signal or Slurm ended it."""
        match = EXIT_CODE.search(self.problem)
        return int(match[1]) if match else None


def task_ends(log: Path) -> list[TaskFailure]:
    """Return the tasks that did not exit with 0, in the order of srun's output."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return []
    matches = TASK_ERROR.finditer(text)
    return [TaskFailure(match["host"], expand_ranges(match["ranks"])[0], match["problem"]) for match in matches]


def first_failure(log: Path) -> TaskFailure | None:
    """Return the first task in srun's output that neither finished nor saved and stopped."""
    return next((end for end in task_ends(log) if end.exit_code != RESUMABLE), None)


def _step_failure(log: Path, end: AttemptEnd) -> str:
    """Return the reason of a failure of srun itself (no such node, no such shell): the last line of its output."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if lines:
        return f"srun failed: {lines[-1]}"
    return f"srun failed without output (exit codes: {', '.join(map(str, end.exit_codes))})"


def preview(run: RunDir, plan: Plan, stage: Stage, profile: ClusterProfile) -> list[str]:
    """Return the argv of the step that a job would start for a stage's first element, without values of variables.

    Empty if only the nodes know which container runtime they have. Raises BadInput.
    """
    if stage.container and stage.container.runtime == "auto" and node_runtime(stage.container) == "none":
        return []
    needs = stage.needs
    assignment = Assignment(needs.cpus, tuple(map(str, range(needs.gpus_per_node))))
    attempt = Attempt(run, plan, stage, stage.elements[0], assignment, Lock(run.root / "lock"), 1)
    names = ["MASTER_ADDR", "MASTER_PORT"]
    if needs.nodes == 1 or profile.interface:
        names.append("GLOO_SOCKET_IFNAME")
    if needs.nodes > 1 and profile.interface:
        names.append("NCCL_SOCKET_IFNAME")
    try:
        return SrunStep(profile).command(attempt, dict.fromkeys(names, ""))[0]
    except UnsetVariable as error:
        raise BadInput(f"stage {stage.name}: {error} (container.env, or env of the profile); export it") from None
    except (OSError, ValueError) as error:
        # CannotLaunch, for example.
        raise BadInput(f"stage {stage.name}: {error}") from None
