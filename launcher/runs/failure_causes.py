"""What made a rank fail, from the last lines of its log: whether another try can help, and whether it must be elsewhere.

The words are those that PyTorch, NCCL, CUDA, glibc and Slurm print; a cause
that is not known here is an error of the code, which another try repeats.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AVOID_SECONDS = 3600.0
"""How long a node that failed a job is left alone by the next tries of that element."""
TAIL_BYTES = 65536


@dataclass(frozen=True)
class Cause:
    """One kind of failure."""

    kind: str
    pattern: str
    """A regular expression, whatever the case."""
    again: bool
    """Whether another try can end otherwise."""
    elsewhere: bool
    """Whether it must not be on the same node."""
    hint: str
    """For people; ``{stage}`` stands for the stage's name."""

    def advice(self, stage: str) -> str:
        """The hint for one stage."""
        return self.hint.replace("{stage}", stage)

    def explain(self, reason: str, stage: str) -> str:
        """A reason with the hint; what both say is said once: ``killed (out of memory?)`` and ``out of memory; give more``."""
        reason = reason.removesuffix(f" ({self.kind}?)")
        what, _, advice = self.advice(stage).partition("; ")
        return (
            f"{reason}; {advice}" if what in reason and advice else f"{reason}: {what}{'; ' if advice else ''}{advice}"
        )


CAUSES = (
    Cause("hang", r"(^|\n)error: rank \d+ on \S+ hangs: ", True, True,
          "a rank got nowhere and ended itself; what its threads did is in its log"),
    Cause("full disk", r"No space left on device|Errno 28\b|Disk quota exceeded|Errno 122\b", False, False,
          "the disk is full, or your quota on it; amlaunch clean shows what can go"),
    Cause("out of GPU memory", r"CUDA out of memory|OutOfMemoryError", False, False,
          "out of GPU memory; a smaller step_scheduler.local_batch_size needs less"),
    Cause("out of memory", r"oom[-_ ]kill|Out Of Memory|exceeded (job|step) memory limit|Exceeded .{0,40}memory limit|DefaultCPUAllocator: can't allocate|\bMemoryError\b", False, False,
          "out of memory; give resources more mem: amlaunch resume RUN --resources.{stage}.mem 64G, say"),
    Cause("no environment", r"slurm_script: line \d+: .*: (No such file or directory|Permission denied|cannot execute)|exec: .*: (not found|cannot execute)|ModuleNotFoundError: No module named", False, False,
          "Python or a package of it is not there; python and setup in the profile say which environment jobs have, amlaunch image check IMAGE what an image has"),
    Cause("broken GPU", r"uncorrectable ECC|ECC error|\bXid\b|GPU has fallen off the bus|unspecified launch failure|CUDA error: (unknown|hardware|an illegal instruction)|no CUDA-capable device", True, True,
          "the GPU or its driver failed"),
    Cause("network", r"ncclSystemError|ncclRemoteError|ncclInternalError|NCCL (error|WARN.*failed)|Watchdog caught collective operation timeout|Connection (closed|reset) by peer|Connection refused|Socket closed|recvValue failed|Broken pipe|No route to host|Network is unreachable", True, True,
          "ranks lost each other"),
    Cause("node", r"Stale file handle|Input/output error|Transport endpoint is not connected|Bus error", True, True,
          "the node or its file system failed"),
)  # fmt: skip
"""Looked for in this order: a full disk breaks connections, too."""


def cause_of(text: str) -> Cause | None:
    """The first cause whose words are in ``text``."""
    return next((cause for cause in CAUSES if re.search(cause.pattern, text, re.IGNORECASE)), None)


def tail_of(log: Path) -> str:
    """The last part of a log; empty where there is none."""
    try:
        with open(log, "rb") as handle:
            handle.seek(max(0, os.fstat(handle.fileno()).st_size - TAIL_BYTES))
            return handle.read().decode(errors="replace")
    except OSError:
        return ""


def nodes_to_avoid(lines: Iterable[Mapping[str, Any]], now: float | None = None) -> list[str]:
    """The nodes where an element failed for the node's own sake within :data:`AVOID_SECONDS`, from ``attempts.jsonl``."""
    oldest = (time.time() if now is None else now) - AVOID_SECONDS
    bad = [
        line for line in lines if line.get("event") == "end" and line.get("elsewhere") and line.get("time", 0) > oldest
    ]
    return sorted({str(line["host"]) for line in bad if line.get("host")})
