"""Address and port at which the ranks of an attempt meet."""

from __future__ import annotations

import fcntl
import socket
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

FIRST_PORT, PORTS = 16384, 16000
"""Below the ports that Linux assigns by itself (32768 and up), so that no passing connection has one of them."""
MAX_FREE_PORTS = 20
"""Number of free ports to try."""
SIOCGIFADDR = 0x8915
"""ioctl number, linux/sockios.h."""


def free_ports(seed: int) -> Iterator[int]:
    """Yield ports on which nobody listens, starting at one that depends on ``seed``: jobs on one host start apart.

    Between this check and rank 0's own bind another process can take the port; then the driver asks for the next one.
    Raises OSError if no port is free.
    """
    free = 0
    for offset in range(PORTS):
        port = FIRST_PORT + (seed * 7 + offset) % PORTS
        if _is_free(port):
            yield port
            free += 1
            if free == MAX_FREE_PORTS:
                return
    raise OSError(f"no free port between {FIRST_PORT} and {FIRST_PORT + PORTS}")


def _is_free(port: int) -> bool:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        with socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6):
            return True
    except OSError:
        return False


def interface_address(name: str, net: Path = Path("/proc/net")) -> str:
    """Return the address of a network interface of this host: IPv4, else global IPv6. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            return socket.inet_ntoa(answer[20:24])
        except OSError:
            pass
    for address in _global_ipv6_addresses(name, net):
        return address
    interfaces = ", ".join(sorted(path.name for path in Path("/sys/class/net").iterdir()))
    raise OSError(f"{socket.gethostname()} has no interface {name!r} with an address; its interfaces: {interfaces}")


def _global_ipv6_addresses(name: str, net: Path) -> Iterator[str]:
    """Yield addresses from ``/proc/net/if_inet6``: address, index, prefix, scope (00: global), flags, name."""
    try:
        lines = (net / "if_inet6").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        address, _, _, scope, _, interface = line.split()
        if interface == name and scope == "00":
            yield socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))


def local_rendezvous(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for ranks that meet on the loopback interface of one host."""
    # Without an interface, gloo looks up the host's own name, which many machines cannot resolve.
    return {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": environ.get("GLOO_SOCKET_IFNAME", "lo")}


def job_rendezvous(nodes: int, interface: str | None, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for the ranks of a job, as seen from its first node, where this runs. Raises OSError.

    The ranks of one node meet on its loopback interface; those of several nodes at this node's name, or at its address
    on ``interface``.
    """
    if nodes == 1:
        return local_rendezvous(environ)
    if not interface:
        return {"MASTER_ADDR": socket.gethostname()}
    return {
        "MASTER_ADDR": interface_address(interface),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }
