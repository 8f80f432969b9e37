"""Start an element's ranks on this machine: their command, their environment, and the container around them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from amlaunch.containers.node_setup import host
from amlaunch.containers.runtimes import catalog, none
from amlaunch.containers.runtimes.catalog import CannotLaunch, ContainerSpec, Launch, parse
from amlaunch.containers.runtimes.enroot import check_single_line_values
from amlaunch.containers.runtimes.environment import runtime_variables
from amlaunch.containers.runtimes.slurm_oci import BUNDLE, NODES_VARIABLE
from amlaunch.launcher.execution.attempt import Attempt
from amlaunch.launcher.execution.rank_wait import Processes
from amlaunch.launcher.execution.rendezvous import local_rendezvous
from amlaunch.launcher.planning.container_start import (
    IMAGE_PYTHON,
    argument_folders,
    container_spec,
    host_python,
    node_check_settings,
    node_runtime,
    passed_variables,
)
from amlaunch.launcher.runs.attempt_record import AttemptEnd
from amlaunch.launcher.slurm import client
from amlaunch.launcher.slurm.client import RENDEZVOUS_VARIABLES
from amlaunch.launcher.specs.machine import set_variables, user_variables
from amlaunch.launcher.specs.plan import StageContainer
from amlaunch.recipes.files import read_object, write_private
from amlaunch.recipes.format.placeholders import expand_text, variables
from amlaunch.recipes.python_process import PARENT_VARIABLE, STDIN_VARIABLE, python_command
from amlaunch.recipes.run_layout import RunDir

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""For glibc on CPU ranks: otherwise it returns every large tensor to the kernel and faults it in again."""
BATCH_TASK_VARIABLES = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
"""Variables of the batch script's own task. srun sets them anew for each task, except in OCI containers."""
PRIVATE_HOME = (
    'if mkdir -m 700 "$HOME" || '
    '{ [ -d "$HOME" ] && [ ! -L "$HOME" ] && [ -O "$HOME" ] && chmod 700 "$HOME"; }; then :; '
    'elif other=$(mktemp -d); then export HOME="$other"; fi 2>/dev/null; exec "$@"'
)
"""Shell code that creates the home folder inside a container, for the user alone.

It may lie in the node's ``/tmp``, where anybody could have created it before, and libraries keep code that they
compiled below it.
"""
COMPILE_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""The cache of ``torch.compile``. By default it is a local folder of the node, which the next node does not have."""


class LocalRanks:
    """Starts the ranks of an attempt as processes of this machine."""

    def start(self, attempt: Attempt, files: ExitStack, port: int) -> Processes:
        """Start one process for each rank. Raises OSError, UnsetVariable and CannotLaunch."""
        tasks = attempt.stage.needs.tasks_per_node
        rendezvous = {
            "WORLD_SIZE": str(tasks),
            "LOCAL_WORLD_SIZE": str(tasks),
            "MASTER_PORT": str(port),
            **local_rendezvous(os.environ),
        }
        start = rank_start(attempt, {}, rendezvous, on_slurm=False)
        env = {**start.env, "CUDA_VISIBLE_DEVICES": ",".join(attempt.assignment.gpus)}
        if not start.spec:
            env[PARENT_VARIABLE] = str(os.getpid())
        return [self._start_rank(attempt, files, start, env, rank) for rank in range(tasks)]

    def _start_rank(
        self, attempt: Attempt, files: ExitStack, start: RankStart, env: Mapping[str, str], rank: int
    ) -> RankProcess:
        return RankProcess(
            start.launch.argv,
            ignores_signals=start.launch.ignores_signals,
            stdin=subprocess.PIPE if start.launch.stdin else subprocess.DEVNULL,
            stdout=files.enter_context(open(attempt.log(rank), "ab")),
            stderr=subprocess.STDOUT,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=attempt.plan.cwd,
            # Ctrl-C is for the launcher to handle.
            start_new_session=True,
            # The lock is free again once the last rank is gone.
            pass_fds=(attempt.lock.fileno(),),
        )

    def check_nodes(self, attempt: Attempt, files: ExitStack) -> Processes:
        """Check this machine before containers start; empty without a container.

        Raises OSError, UnsetVariable and CannotLaunch.
        """
        start = rank_start(attempt, {}, {}, on_slurm=False)
        create_folders(attempt, start)
        command = check_command(attempt, start, parent=os.getpid())
        if not command:
            return []
        output = files.enter_context(open(attempt.log(None), "ab"))
        env = check_environment(attempt)
        return [
            RankProcess(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        ]

    def own_codes(self, attempt: Attempt, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the codes as they are: each is a rank's own."""
        return codes

    def explain(self, attempt: Attempt, end: AttemptEnd) -> AttemptEnd:
        """Return the end as it is: exit codes of own processes tell all."""
        return end


class RankProcess(subprocess.Popen[bytes]):
    """A rank, or the program of the container runtime that runs it; exit codes follow Python's convention.

    ``ignores_signals``: signals do not reach the command (:class:`containers.runtimes.launch.Launch`).
    """

    def __init__(self, *args: Any, ignores_signals: bool = False, **kwargs: Any):
        self.ignores_signals = ignores_signals
        super().__init__(*args, **kwargs)

    def send_signal(self, sig: int) -> None:
        """Kill with all descendants; send requests to stop only to a program that forwards them."""
        if sig == signal.SIGKILL and os.getpgid(self.pid) == self.pid:
            os.killpg(self.pid, sig)
        elif not (self.ignores_signals and sig in (signal.SIGTERM, signal.SIGUSR1)):
            super().send_signal(sig)

    def poll(self) -> int | None:
        """Return the exit code; a signal inside a container gives its negative number, not 128 more."""
        return python_exit_code(super().poll())


def python_exit_code(code: int | None) -> int | None:
    """Convert a shell's exit code to Python's convention, negative for signals."""
    return 128 - code if code is not None and 128 < code < 128 + signal.NSIG else code


@dataclass(frozen=True)
class RankStart:
    """The command of a rank in its container, and the environment of the process that starts it."""

    launch: Launch
    env: dict[str, str]
    runtime: str
    spec: ContainerSpec | None = None


def rank_start(
    attempt: Attempt, site_env: Mapping[str, str], rendezvous: Mapping[str, str], *, on_slurm: bool
) -> RankStart:
    """Return how to start a rank. Raises UnsetVariable, OSError and CannotLaunch.

    ``site_env``: variables of the cluster profile. The recipe's variables override them, and both override ours, except
    those that hold a run together.
    """
    recipe_env = {key: expand_text(value, variables()) for key, value in attempt.plan.env.items()}
    env = {**default_environment(attempt), **site_env, **recipe_env}
    container = attempt.stage.container
    runtime = node_runtime(container) if container else "none"
    if container is None or runtime == "none":
        _refuse_missing_runtime(container)
        return _plain_start(attempt, env, rendezvous)
    return _container_start(attempt, container, runtime, env, rendezvous, on_slurm)


def _refuse_missing_runtime(container: StageContainer | None) -> None:
    """Raise CannotLaunch if a container was requested and this node has no runtime for it."""
    if container is None or container.runtime != "auto":
        return
    candidates = ", ".join(catalog.runtimes_for(parse(container.image)))
    raise CannotLaunch(
        f"{host()} has no runtime for {container.image} (tried {candidates}); "
        "install one of them, or set container.runtime: none to run in the environment that submitted"
    )


def _plain_start(attempt: Attempt, env: dict[str, str], rendezvous: Mapping[str, str]) -> RankStart:
    """Return how to start a rank without a container."""
    path = [env.get("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
    rank_env = {**env, **fixed_environment(attempt, path), **rendezvous}
    command = [*python_command(attempt.element.module), *attempt.element.arguments]
    return RankStart(none.launch(ContainerSpec(env=rank_env), command), {**host_environment(), **rank_env}, "none")


def _container_start(
    attempt: Attempt,
    container: StageContainer,
    runtime: str,
    env: dict[str, str],
    rendezvous: Mapping[str, str],
    on_slurm: bool,
) -> RankStart:
    """Return how to start a rank in its container."""
    has_own_home = "HOME" in env
    inside_env = {
        "HOME": f"/tmp/amlaunch-{os.getuid()}",
        **user_variables(),
        **env,
        **fixed_environment(attempt, [env.get("PYTHONPATH", "")]),
        **rendezvous,
    }
    # Slurm ends what remains of a step. On this machine nothing does, and with most runtimes the driver is not the
    # parent of the rank: it must keep an input open by which the rank notices its end.
    stdin = runtime in catalog.DAEMON_RUNTIMES or not on_slurm
    if stdin:
        inside_env[STDIN_VARIABLE] = "1"
    if runtime == "slurm":
        inside_env[NODES_VARIABLE] = " ".join(client.ordered_hosts(os.environ.get("SLURM_JOB_NODELIST", "")))

    passed = passed_variables(container, secret_names(attempt.run), on_slurm=on_slurm)
    spec = container_spec(attempt.run, attempt.plan, attempt.stage, inside_env, passed, on_slurm=on_slurm)
    command = [*python_command(attempt.element.module, IMAGE_PYTHON, any_version=True), *attempt.element.arguments]
    if not has_own_home:
        command = ["sh", "-c", PRIVATE_HOME, "sh", *command]
    launch = _with_bundle_folder(attempt, replace(catalog.launch(runtime, spec, command), stdin=stdin))

    forwarded = {name: os.environ[name] for name in spec.passed if name in os.environ}
    if runtime in ("pyxis", "enroot"):
        check_single_line_values(forwarded, runtime)
    runtime_env = runtime_variables(host_environment(), container.runtime_env, is_srun=runtime in catalog.SRUN_RUNTIMES)
    outer_env = {
        name: value for name, value in {**runtime_env, **forwarded}.items() if name not in BATCH_TASK_VARIABLES
    }
    return RankStart(launch, {**user_variables(), **outer_env, **launch.env}, runtime, spec)


def _with_bundle_folder(attempt: Attempt, launch: Launch) -> Launch:
    """Fill in the folder of an OCI bundle: runc takes no path with a link in it, and shared stages lie behind one."""
    if launch.bundle is None:
        return launch
    folder = str(attempt.folder.root.resolve() / "bundle")
    return replace(launch, srun=tuple(flag.replace(BUNDLE, folder) for flag in launch.srun))


def create_folders(attempt: Attempt, start: RankStart) -> None:
    """Create what a container needs on disk: the folders that it mounts, and its bundle, which may hold secrets."""
    for folder in argument_folders(attempt.stage) if start.spec else ():
        folder.mkdir(parents=True, exist_ok=True)
    if start.launch.bundle is not None:
        folder = attempt.folder.root / "bundle"
        (folder / "rootfs").mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(folder / "config.json", start.launch.bundle)


def secret_names(run: RunDir) -> list[str]:
    """Return the names of the variables in the run's private environment file."""
    return list(read_object(run.environment))


def host_environment() -> dict[str, str]:
    """Return our environment without a rendezvous that a shell, a prolog or an image's hook has set up."""
    excluded = (*RENDEZVOUS_VARIABLES, "SLURM_EXPORT_ENV")
    return {name: value for name, value in os.environ.items() if name not in excluded}


def default_environment(attempt: Attempt) -> dict[str, str]:
    """Return variables that ranks have unless the user, the site or the recipe sets them."""
    threads = max(1, attempt.assignment.cpus // attempt.stage.needs.tasks_per_node)
    defaults = {
        "OMP_NUM_THREADS": str(threads),
        COMPILE_CACHE_VARIABLE: str(attempt.run.compile_cache),
        **({"AMLAUNCH_DEVICE": "cuda"} if attempt.assignment.gpus else KEEP_MEMORY),
    }
    return {**defaults, **set_variables(defaults)}


def fixed_environment(attempt: Attempt, path: Iterable[str]) -> dict[str, str]:
    """Return variables that nobody can override: the run's own code comes first, and ranks without GPUs use the CPU."""
    env = {"PYTHONPATH": os.pathsep.join(filter(None, [str(attempt.run.code), *path])), "PYTHONSAFEPATH": "1"}
    return env if attempt.assignment.gpus else {**env, "AMLAUNCH_DEVICE": "cpu"}


def check_environment(attempt: Attempt) -> dict[str, str]:
    """Return the environment of the node check."""
    return {**user_variables(), **host_environment(), "PYTHONPATH": str(attempt.run.code), "PYTHONSAFEPATH": "1"}


def check_command(attempt: Attempt, start: RankStart, python: str | None = None, **extra: Any) -> list[str]:
    """Return the command that checks a node before containers start on it, and fetches the image there.

    Empty without a container. ``python``: the cluster profile's; ``extra``: further settings of the check.
    """
    container = attempt.stage.container
    if container is None or start.spec is None:
        return []
    settings = {
        **node_check_settings(container, start.runtime, start.spec, start.launch, attempt.folder.verdicts),
        **extra,
    }
    command = python_command("amlaunch.containers.node_setup", host_python(python), any_version=python is not None)
    return [*command, json.dumps(settings)]
