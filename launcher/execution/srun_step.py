"""How an element's ranks are started in a job of Slurm: one ``srun`` step, whose words say which rank on which node failed.

What srun does with signals was seen on Slurm 22.05: SIGTERM to srun kills the
tasks at once ("forcing job termination"), SIGUSR1 is passed on to all of them.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from amlaunch.launcher.execution.attempt import Assignment, Attempt
from amlaunch.launcher.execution.rank_processes import (
    Rank,
    RankStart,
    check_command,
    host_environment,
    how_to_start,
    make_room,
    meeting_place,
)
from amlaunch.launcher.planning.stage_container import runtime_here
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.slurm.client import expand_ranges
from amlaunch.launcher.specs.cluster_profile import ClusterProfile
from amlaunch.launcher.specs.machine import who
from amlaunch.launcher.specs.plan import Needs, Plan, Stage
from amlaunch.recipes.errors import BAD_INPUT, RESUMABLE, BadInput
from amlaunch.recipes.files import Lock
from amlaunch.recipes.format.placeholders import UnsetVariable, expand_text, variables
from amlaunch.recipes.run_layout import RunDir

SAID = re.compile(r"srun: error: (?P<host>[^\s:]+): tasks? (?P<ranks>[\d,\-]+): (?P<what>.+)")
"""srun's line for tasks that did not exit with 0."""
CODE = re.compile(r"Exited with exit code (\d+)")


class Step:
    """Starts the ranks of an attempt as a step of the job that we run in."""

    def __init__(self, profile: ClusterProfile):
        self.profile = profile

    def start(self, attempt: Attempt, files: ExitStack, port: int) -> list[subprocess.Popen[bytes]]:
        """The one srun that stands for all ranks; it writes a log for each. Raises OSError, Unset and CannotLaunch."""
        needs = attempt.stage.needs
        meeting = {**meeting_place(needs.nodes, self.profile.interface, os.environ), "MASTER_PORT": str(port)}
        command, start = self.command(attempt, meeting)
        make_room(attempt, start)
        # srun creates a rank's log when it starts it; ours must be there for what comes before.
        output = files.enter_context(open(attempt.log(None), "ab"))
        stdin = subprocess.PIPE if start.launch.stdin else subprocess.DEVNULL
        return [
            Srun(command, deaf=start.launch.deaf, stdin=stdin, stdout=output, stderr=subprocess.STDOUT, env=start.env)
        ]

    def command(self, attempt: Attempt, meeting: Mapping[str, str]) -> tuple[list[str], RankStart]:
        """The step's argv, and what is started in it. Nothing is written. Raises OSError, Unset and CannotLaunch."""
        start = how_to_start(attempt, self._site(), meeting, on_slurm=True)
        log = attempt.folder.log(attempt.number, 0)
        return [*srun(attempt.stage.needs, log, self.profile.srun, attempt.plan.cwd, start), *start.launch.argv], start

    def check(self, attempt: Attempt, files: ExitStack) -> list[subprocess.Popen[bytes]]:
        """A look at every node before containers start there, as a step of its own; nothing where there are none."""
        start = how_to_start(attempt, self._site(), {}, on_slurm=True)
        make_room(attempt, start)
        argv = check_command(attempt, start, self.profile.python)
        if not argv:
            return []
        nodes = attempt.stage.needs.nodes
        output = files.enter_context(open(attempt.log(None), "ab"))
        command = [
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
        env = {**who(), **host_environment(), "PYTHONPATH": str(attempt.run.code), "PYTHONSAFEPATH": "1"}
        return [Srun([*command, *argv], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env)]

    def _site(self) -> dict[str, str]:
        return {key: expand_text(value, variables()) for key, value in self.profile.env.items()}

    def explain(self, attempt: Attempt, end: dict[str, Any]) -> dict[str, Any]:
        """Name rank and host of what ended first, from srun's own words."""
        if end["outcome"] != State.FAILED or end.get("retry") is False or "kind" in end:
            return end
        said = first_failure(attempt.log(None))
        if said is None:
            return {**end, "reason": end["reason"].replace("rank 0", "the step", 1), **_last_words(attempt.log(None))}
        host, rank, what = said
        code = CODE.search(what)
        if code:
            bad = int(code[1]) == BAD_INPUT
            return {
                **end,
                "rank": rank,
                "host": host,
                "reason": f"rank {rank} exited with code {code[1]}",
                "again": False,
                "retry": not bad,
            }
        hint = " (out of memory?)" if what.startswith(("Killed", "Out Of Memory")) else ""
        return {**end, "rank": rank, "host": host, "reason": f"rank {rank} ended: {what}{hint}", "again": True}


class Srun(Rank):
    """srun as the driver's "rank": asked to stop by the signal that reaches its tasks; its exit code in Python's terms."""

    def send_signal(self, sig: int) -> None:
        """SIGTERM, which would kill the tasks, becomes SIGUSR1, which they hear as "save and leave"."""
        super().send_signal(signal.SIGUSR1 if sig == signal.SIGTERM else sig)


def srun(needs: Needs, log: Path, more: list[str], cwd: str, start: RankStart) -> list[str]:
    """srun's part of the command: every rank of the element, each with a log of its own beside ``log``.

    Ranks in a container meet without MPI's servers, whatever the site starts by default; a container of a daemon lives as long
    as its input, which comes from here. Tasks and CPUs are said again: since 22.05 srun does not take ``cpus-per-task`` over from sbatch.
    """
    pattern = str(log.parent).replace("%", "%%") + "/" + log.name.replace("rank0", "rank%t")
    return [
        "srun", f"--nodes={needs.nodes}", f"--ntasks={needs.nodes * needs.tasks_per_node}", f"--ntasks-per-node={needs.tasks_per_node}",
        f"--cpus-per-task={max(1, needs.cpus // needs.tasks_per_node)}", "--kill-on-bad-exit=1", "--wait=60", "--unbuffered",
        f"--input={'all' if start.launch.stdin else 'none'}", "--open-mode=append", f"--output={pattern}", f"--chdir={cwd}",
        *(["--mpi=none"] if start.image else []), *more, *start.launch.srun,
    ]  # fmt: skip


def first_failure(log: Path) -> tuple[str, int, str] | None:
    """``(host, rank, what)`` of the first task that srun saw end otherwise than done or saved."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return None
    for match in SAID.finditer(text):
        code = CODE.search(match["what"])
        if not code or int(code[1]) != RESUMABLE:
            return match["host"], expand_ranges(match["ranks"])[0], match["what"]
    return None


def _last_words(log: Path) -> dict[str, Any]:
    """Where srun itself failed (no such node, no such shell): its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {"reason": f"the step failed: {lines[-1]}"} if lines else {}


def preview(run: RunDir, plan: Plan, stage: Stage, profile: ClusterProfile) -> list[str]:
    """The argv of the step that starts the first element of a stage, as a job would have it; values of variables are not in it.

    Empty where only nodes know what starts its container. Raises BadInput.
    """
    if stage.container and stage.container.runtime == "auto" and runtime_here(stage.container) == "none":
        return []
    needs = stage.needs
    given = Assignment(needs.cpus, tuple(map(str, range(needs.gpus_per_node))))
    attempt = Attempt(run, plan, stage, stage.elements[0], given, Lock(run.root / "lock"), 1)
    names = (
        "MASTER_ADDR",
        "MASTER_PORT",
        *(("GLOO_SOCKET_IFNAME",) if needs.nodes == 1 or profile.interface else ()),
        *(("NCCL_SOCKET_IFNAME",) if needs.nodes > 1 and profile.interface else ()),
    )
    try:
        return Step(profile).command(attempt, dict.fromkeys(names, ""))[0]
    except UnsetVariable as error:
        raise BadInput(
            f"stage {stage.name}: {error} (env of the recipe's container, or of the profile); export it"
        ) from None
    except (OSError, ValueError) as error:  # CannotLaunch, for one
        raise BadInput(f"stage {stage.name}: {error}") from None
