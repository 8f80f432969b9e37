"""What this machine has to give: the CPUs we may use, and its GPUs."""

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
    """Ids as CUDA_VISIBLE_DEVICES writes them."""


def this_machine() -> Machine:
    """CPUs of our affinity mask and cgroup (not of the whole node), GPUs that CUDA_VISIBLE_DEVICES leaves us."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(max(1, min(cpus, _cgroup_cpus() or cpus)), _visible_gpus())


def _cgroup_cpus() -> int | None:
    """The CPU quota of a container, in whole CPUs (cgroup v2)."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, int(quota) // int(period))


def _visible_gpus() -> tuple[str, ...]:
    """Device nodes, not nvidia-smi: asking the driver takes a second on an 8-GPU node."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return tuple(part.strip() for part in chosen.split(",") if part.strip() not in ("", "-1", "NoDevFiles"))
    numbers = [int(path.name[6:]) for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    return tuple(str(number) for number in sorted(numbers))


def who() -> dict[str, str]:
    """The user's name: ch-run ends without, and so does what looks for a cache of one's own inside, where no /etc/passwd has it."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = str(os.getuid())
    return {"USER": name, "LOGNAME": name, **given(("USER", "LOGNAME"))}


def given(names: Iterable[str]) -> dict[str, str]:
    """What the user has set of ``names``."""
    return {name: os.environ[name] for name in names if name in os.environ}
