"""How an element's ranks are started on this machine, and what they are told: where to meet, what to use, which code to run."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amlaunch.containers.node_setup import host
from amlaunch.containers.runtimes import catalog, none
from amlaunch.containers.runtimes.catalog import CannotLaunch, Image, Launch, parse
from amlaunch.containers.runtimes.enroot import check_lines
from amlaunch.containers.runtimes.environment import of_runtime
from amlaunch.containers.runtimes.slurm_oci import BUNDLE, NODES_VARIABLE
from amlaunch.launcher.execution.attempt import Attempt
from amlaunch.launcher.planning.stage_container import (
    INSIDE_PYTHON,
    host_python,
    image_of,
    named_folders,
    node_check,
    passed_names,
    runtime_here,
)
from amlaunch.launcher.slurm import client
from amlaunch.launcher.slurm.client import RENDEZVOUS
from amlaunch.launcher.specs.machine import given, who
from amlaunch.recipes.files import read_object, write_private
from amlaunch.recipes.format.placeholders import expand_text, variables
from amlaunch.recipes.python_process import PARENT_VARIABLE, STDIN_VARIABLE, python_command
from amlaunch.recipes.run_layout import RunDir

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""For glibc, on the CPU: else it hands every large tensor back to the kernel and faults it in again (docs/log.md)."""
OF_BATCH = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")
"""Of the batch script's own task; srun says others to each of its own, except in containers of its own."""
PRIVATE_HOME = (
    'if mkdir -m 700 "$HOME" || { [ -d "$HOME" ] && [ ! -L "$HOME" ] && [ -O "$HOME" ] && chmod 700 "$HOME"; }; then :; '
    'elif other=$(mktemp -d); then export HOME="$other"; fi 2>/dev/null; exec "$@"'
)
"""The home inside is made, and is the user's alone: ``/tmp`` may be the node's, where anybody could have made it before, and libraries keep code
that they compiled below it."""
COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Where ``torch.compile`` keeps what it made; its default is a folder of the node, which the next node does not have."""
FIRST_PORT, PORTS = 16384, 16000
"""Below what Linux gives out by itself (32768 and up), so that no passing connection has it."""
MAX_PORTS = 20
SIOCGIFADDR = 0x8915  # linux/sockios.h


def start_local(attempt: Attempt, files: ExitStack, port: int) -> list[subprocess.Popen[bytes]]:
    """One process a rank, here. Raises OSError, Unset and CannotLaunch."""
    tasks = attempt.stage.needs.tasks_per_node
    meeting = {
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    # Without an interface gloo looks up the host's own name, which many machines cannot resolve.
    meeting["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    start = how_to_start(attempt, {}, meeting, on_slurm=False)
    mine = {
        "CUDA_VISIBLE_DEVICES": ",".join(attempt.given.gpus),
        **({} if start.image else {PARENT_VARIABLE: str(os.getpid())}),
    }
    ranks: list[subprocess.Popen[bytes]] = []
    for rank in range(tasks):
        log = attempt.log(rank)
        ranks.append(
            Rank(
                start.launch.argv,
                deaf=start.launch.deaf,
                stdin=subprocess.PIPE if start.launch.stdin else subprocess.DEVNULL,
                stdout=files.enter_context(open(log, "ab")),
                stderr=subprocess.STDOUT,
                env={**start.env, **mine, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=attempt.plan.cwd,
                start_new_session=True,  # Ctrl-C is the launcher's to handle
                pass_fds=(attempt.lock.fileno(),),  # the lock is free again when the last rank is gone
            )
        )
    return ranks


class Rank(subprocess.Popen[bytes]):
    """A rank, or the runtime's program that has it in a container: its exit code in Python's terms. ``deaf``: see :class:`containers.Launch`."""

    def __init__(self, *words: Any, deaf: bool = False, **more: Any):
        self.deaf = deaf
        super().__init__(*words, **more)

    def send_signal(self, sig: int) -> None:
        """What asks to save and leave only where it is heard; what ends it in any case, with all that it has started."""
        if sig == signal.SIGKILL and os.getpgid(self.pid) == self.pid:
            os.killpg(self.pid, sig)
        elif not (self.deaf and sig in (signal.SIGTERM, signal.SIGUSR1)):
            super().send_signal(sig)

    def poll(self) -> int | None:
        """As ever, but what a signal ended inside a container is that signal's negative number, not 128 more."""
        return signal_of(super().poll())


def signal_of(code: int | None) -> int | None:
    """The exit code of a shell, or of a program like one, as Python has them."""
    return 128 - code if code is not None and 128 < code < 128 + signal.NSIG else code


@dataclass(frozen=True)
class RankStart:
    """What is started, and with which environment."""

    launch: Launch
    env: dict[str, str]
    runtime: str
    image: Image | None = None


def how_to_start(attempt: Attempt, site: Mapping[str, str], meeting: Mapping[str, str], *, on_slurm: bool) -> RankStart:
    """The command of a rank, in its container, and the environment of what starts it. Raises Unset, OSError and CannotLaunch.

    ``site``: the profile's variables; a recipe's own win over them, and both over ours where it is not what holds a run together.
    """
    recipe = {key: expand_text(value, variables()) for key, value in attempt.plan.env.items()}
    wanted = {**defaults(attempt), **site, **recipe}
    container = attempt.stage.container
    runtime = runtime_here(container) if container else "none"
    if container is not None and runtime == "none" and container.runtime == "auto":
        raise CannotLaunch(
            f"{container.image} is asked for, and {host()} has nothing that starts it ({', '.join(catalog.able(parse(container.image)))}); "
            "container.runtime: none in the recipe runs without a container, in the environment that submitted"
        )
    if container is None or runtime == "none":
        path = [wanted.pop("PYTHONPATH", ""), os.environ.get("PYTHONPATH", "")]
        fixed = {**fixed_environment(attempt, path), **meeting}
        command = [*python_command(attempt.element.module), *attempt.element.arguments]
        return RankStart(
            none.launch(Image(env={**wanted, **fixed}), command), {**host_environment(), **wanted, **fixed}, "none"
        )
    fixed = {**fixed_environment(attempt, [wanted.pop("PYTHONPATH", "")]), **meeting}
    # Slurm ends what is left of a step. Here nobody does, and who starts a rank in a container is its parent with few runtimes.
    stdin = runtime in catalog.DAEMONS or not on_slurm
    lives = {STDIN_VARIABLE: "1"} if stdin else {}
    nodes = (
        {NODES_VARIABLE: " ".join(client.ordered_hosts(os.environ.get("SLURM_JOB_NODELIST", "")))}
        if runtime == "slurm"
        else {}
    )
    env = {"HOME": f"/tmp/amlaunch-{os.getuid()}", **who(), **wanted, **fixed, **lives, **nodes}
    passed = passed_names(container, secret_names(attempt.run), on_slurm=on_slurm)
    image = image_of(attempt.run, attempt.plan, attempt.stage, env, passed, on_slurm=on_slurm)
    command = [*python_command(attempt.element.module, INSIDE_PYTHON, any_version=True), *attempt.element.arguments]
    command = command if "HOME" in wanted else ["sh", "-c", PRIVATE_HOME, "sh", *command]
    found = replace(catalog.launch(runtime, image, command), stdin=stdin)
    if found.bundle is not None:
        folder = str(
            attempt.folder.root.resolve() / "bundle"
        )  # runc takes no path with a link in it, and shared stages lie behind one
        found = replace(found, srun=tuple(flag.replace(BUNDLE, folder) for flag in found.srun))
    handed_on = {name: os.environ[name] for name in image.passed if name in os.environ}
    if runtime in ("pyxis", "enroot"):
        check_lines(handed_on, runtime)
    mine = {
        name: value
        for name, value in {
            **of_runtime(host_environment(), container.runtime_env, is_srun=runtime in catalog.OF_SRUN),
            **handed_on,
        }.items()
        if name not in OF_BATCH
    }
    return RankStart(found, {**who(), **mine, **found.env}, runtime, image)


def make_room(attempt: Attempt, start: RankStart) -> None:
    """What must lie on disk before a container starts: the folders that are mounted, and the bundle, whose description may hold secrets."""
    for folder in named_folders(attempt.stage) if start.image else ():
        folder.mkdir(parents=True, exist_ok=True)
    if start.launch.bundle is not None:
        folder = attempt.folder.root / "bundle"
        (folder / "rootfs").mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(folder / "config.json", start.launch.bundle)


def secret_names(run: RunDir) -> list[str]:
    """The variables that came with the job in a file of its own."""
    return list(read_object(run.environment))


def host_environment() -> dict[str, str]:
    """Ours, without a rendezvous that somebody else arranged (a shell, a prolog, an image's hook)."""
    return {name: value for name, value in os.environ.items() if name not in (*RENDEZVOUS, "SLURM_EXPORT_ENV")}


def defaults(attempt: Attempt) -> dict[str, str]:
    """What ranks are told unless somebody says otherwise: their part of the CPUs, and a folder for compiled code that all nodes see."""
    found = {
        "OMP_NUM_THREADS": str(max(1, attempt.given.cpus // attempt.stage.needs.tasks_per_node)),
        COMPILE_CACHE: str(attempt.run.compile_cache),
        **({} if attempt.given.gpus else KEEP_MEMORY),
    }
    return {**found, **given(found)}


def fixed_environment(attempt: Attempt, path: Iterable[str]) -> dict[str, str]:
    """What nobody may say otherwise: the run's own code comes first, and without GPUs the CPU computes."""
    env = {"PYTHONPATH": os.pathsep.join(filter(None, [str(attempt.run.code), *path])), "PYTHONSAFEPATH": "1"}
    return env if attempt.given.gpus else {**env, "AMLAUNCH_DEVICE": "cpu"}


def check_command(attempt: Attempt, start: RankStart, python: str | None = None, **more: Any) -> list[str]:
    """What looks at a node before a container starts on it, and brings the image there; empty where there is no container."""
    container = attempt.stage.container
    if container is None or start.image is None:
        return []
    spec = {**node_check(container, start.runtime, start.image, start.launch, attempt.folder.verdicts), **more}
    return [
        *python_command("amlaunch.containers.node_setup", host_python(python), any_version=python is not None),
        json.dumps(spec),
    ]


def check_here(attempt: Attempt, files: ExitStack) -> list[subprocess.Popen[bytes]]:
    """Look at this machine before the ranks start; nothing where they have no container. Raises OSError, Unset and CannotLaunch."""
    start = how_to_start(attempt, {}, {}, on_slurm=False)
    make_room(attempt, start)
    argv = check_command(attempt, start, parent=os.getpid())
    if not argv:
        return []
    output = files.enter_context(open(attempt.log(None), "ab"))
    env = {**who(), **host_environment(), "PYTHONPATH": str(attempt.run.code), "PYTHONSAFEPATH": "1"}
    return [
        Rank(argv, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    ]


def free_ports(seed: int) -> Iterator[int]:
    """Ports that nobody listens on, from one that ``seed`` (a job's number) gives: two jobs on one host start apart.

    Between this look and rank 0's own bind another process can take one; the
    driver then asks for the next.
    """
    tried = 0
    for offset in range(PORTS):
        port = FIRST_PORT + (seed * 7 + offset) % PORTS
        if _is_free(port):
            yield port
            tried += 1
            if tried == MAX_PORTS:
                return
    raise OSError(f"no free port from {FIRST_PORT} to {FIRST_PORT + PORTS}")


def _is_free(port: int) -> bool:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        with socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6):
            return True
    except OSError:
        return False


def interface_address(name: str, net: Path = Path("/proc/net")) -> str:
    """The address of a network interface of this host: its IPv4 one, else its global IPv6 one. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            return socket.inet_ntoa(answer[20:24])
        except OSError:
            pass
    for address in _ipv6_addresses(name, net):
        return address
    known = ", ".join(sorted(path.name for path in Path("/sys/class/net").iterdir()))
    raise OSError(f"{socket.gethostname()} has no interface {name!r} with an address; it has {known}")


def _ipv6_addresses(name: str, net: Path) -> Iterator[str]:
    """``/proc/net/if_inet6``: address, index, prefix, scope (00: global), flags, name."""
    try:
        lines = (net / "if_inet6").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        address, _, _, scope, _, interface = line.split()
        if interface == name and scope == "00":
            yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))


def meeting_place(nodes: int, interface: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Where the ranks of a job meet, as seen from its first node, where this runs. Raises OSError.

    On one node they meet on its loopback interface; on several, at this node's
    name or at its address on ``interface``.
    """
    if nodes == 1:
        return {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": environ.get("GLOO_SOCKET_IFNAME", "lo")}
    if not interface:
        return {"MASTER_ADDR": socket.gethostname()}
    return {
        "MASTER_ADDR": interface_address(interface),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }
