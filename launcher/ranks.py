"""How an element's ranks are started on this machine, and what they are told: where to meet, what to use, which code to run."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import containers
from launcher.attempt import Attempt
from recipes.expand import expand, variables
from recipes.process import PARENT_VARIABLE, python_command

KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""For glibc, on the CPU: else it hands every large tensor back to the kernel and faults it in again (docs/log.md)."""
COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Where ``torch.compile`` keeps what it made; its default is a folder of the node, which the next node does not have."""
FIRST_PORT, PORTS = 16384, 16000
"""Below what Linux gives out by itself (32768 and up), so that no passing connection has it."""
MAX_PORTS = 20
SIOCGIFADDR = 0x8915  # linux/sockios.h


def start_local(attempt: Attempt, files: ExitStack, port: int) -> list[subprocess.Popen[bytes]]:
    """One process a rank, here. Raises OSError and Unset."""
    argv, extra = command_of(attempt)
    tasks = attempt.stage.needs.tasks_per_node
    meeting = {"WORLD_SIZE": str(tasks), "LOCAL_WORLD_SIZE": str(tasks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    # Without an interface gloo looks up the host's own name, which many machines cannot resolve.
    meeting["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    mine = {"CUDA_VISIBLE_DEVICES": ",".join(attempt.given.gpus), PARENT_VARIABLE: str(os.getpid())}
    shared = {**os.environ, **extra, **environment(attempt), **meeting, **mine}
    ranks = []
    for rank in range(tasks):
        log = attempt.log(rank)
        ranks.append(
            subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=files.enter_context(open(log, "ab")),
                stderr=subprocess.STDOUT,
                env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=attempt.plan.cwd,
                start_new_session=True,  # Ctrl-C is the launcher's to handle
                pass_fds=(attempt.lock.fileno(),),  # the lock is free again when the last rank is gone
            )
        )
    return ranks


def command_of(attempt: Attempt) -> tuple[list[str], dict[str, str]]:
    """``(argv, extra environment)`` of one rank, in the runtime of the container. Raises Unset."""
    command = [*python_command(attempt.element.module), *attempt.element.arguments]
    wanted = {key: str(expand(value, variables())) for key, value in attempt.plan.env.items()}
    return containers.launch("none", containers.Image(env=wanted), command)


def environment(attempt: Attempt) -> dict[str, str]:
    """What all ranks share on any host: the run's code, and their part of the CPUs."""
    path = [str(attempt.run.code), os.environ.get("PYTHONPATH", "")]
    env = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, attempt.given.cpus // attempt.stage.needs.tasks_per_node))),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONSAFEPATH": "1",
        COMPILE_CACHE: os.environ.get(COMPILE_CACHE, str(attempt.run.compile_cache)),
    }
    return env if attempt.given.gpus else {**KEEP_MEMORY, **given(KEEP_MEMORY), **env, "AMLAUNCH_DEVICE": "cpu"}


def given(names: Iterable[str]) -> dict[str, str]:
    """What the user has set of ``names``."""
    return {name: os.environ[name] for name in names if name in os.environ}


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
    return {"MASTER_ADDR": interface_address(interface), "GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
