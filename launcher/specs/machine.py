"""Resources of this machine: the CPUs that this process may use, and the GPUs."""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Capacity for local elements."""

    cpus: int
    gpus: tuple[str, ...]
    """IDs as in ``CUDA_VISIBLE_DEVICES``."""


def this_machine() -> Machine:
    """Return the CPUs of our affinity mask and cgroup, and the GPUs that ``CUDA_VISIBLE_DEVICES`` allows."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(max(1, min(cpus, _cgroup_cpus() or cpus)), _visible_gpus())


def _cgroup_cpus() -> int | None:
    """Return the CPU quota of a container in complete CPUs (cgroup v2); None without a quota."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, int(quota) // int(period))


def _visible_gpus() -> tuple[str, ...]:
    """Return GPU IDs from device nodes: asking the driver (nvidia-smi) takes a second on an 8-GPU node."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        ids = (part.strip() for part in visible.split(","))
        return tuple(gpu for gpu in ids if gpu not in ("", "-1", "NoDevFiles"))
    devices = (re.fullmatch(r"nvidia(\d+)", path.name) for path in Path("/dev").glob("nvidia*"))
    return tuple(str(number) for number in sorted(int(device[1]) for device in devices if device))


def user_variables() -> dict[str, str]:
    """Return ``USER`` and ``LOGNAME``, as set or from the user database.

    ch-run fails without them, and so do libraries in a container without our user that look for a cache folder.
    """
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = str(os.getuid())
    return {"USER": name, "LOGNAME": name, **set_variables(("USER", "LOGNAME"))}


def set_variables(names: Iterable[str]) -> dict[str, str]:
    """Return those of the named environment variables that are set."""
    return {name: os.environ[name] for name in names if name in os.environ}
