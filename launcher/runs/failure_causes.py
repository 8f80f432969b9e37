"""Classify a rank's failure from the tail of its log: is it retryable, and must the retry avoid this node?

The patterns match messages of PyTorch, NCCL, CUDA, glibc and Slurm. A cause that is not known here is taken for an
error of the code, which a retry would repeat.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from amlaunch.containers.start_failures import FAILURES_BY_KIND

TAIL_BYTES = 65536
TRACEBACK = "Traceback (most recent call last):"
EXCEPTION = "exception"
"""The kind of a failure whose reason is the exception that ended the rank."""
MAX_REASON_CHARACTERS = 300
"""An exception's message may be as long as a tensor."""


@dataclass(frozen=True)
class Cause:
    """One kind of failure."""

    kind: str
    patterns: tuple[str, ...]
    """Regular expressions; case is ignored."""
    explanation: str
    remedy: str = ""
    """Advice to the user; ``{stage}`` stands for the stage's name."""
    resume_options: str = ""
    """Options of ``amlaunch resume`` with which the element can succeed."""
    restart: bool = False
    """True if a retry can succeed."""
    avoid_host: bool = False
    """True if the retry must run on another node."""

    def explain(self, reason: str, stage: str, *, is_named: bool = False) -> str:
        """Return a reason completed by explanation and remedy; ``is_named``: the reason names the cause already."""
        remedy = self.remedy.replace("{stage}", stage)
        parts = [reason if is_named else f"{reason}: {self.explanation}", remedy]
        return "; ".join(part for part in parts if part)


CAUSES = (
    Cause(
        "hang",
        (r"(^|\n)error: rank \d+ on \S+ hangs: ",),
        "a rank made no progress and ended itself; its log shows what its threads were doing",
        restart=True,
        avoid_host=True,
    ),
    Cause(
        "full disk",
        (r"No space left on device", r"Errno 28\b", r"Disk quota exceeded", r"Errno 122\b"),
        "the disk or your quota is full",
        "find what to delete: amlaunch clean",
    ),
    Cause(
        "out of GPU memory",
        (r"CUDA out of memory", r"OutOfMemoryError"),
        "out of GPU memory",
        "reduce step_scheduler.local_batch_size",
    ),
    Cause(
        "out of memory",
        (
            r"oom[-_ ]kill",
            r"Out Of Memory",
            r"exceeded (job|step) memory limit",
            r"Exceeded .{0,40}memory limit",
            r"DefaultCPUAllocator: can't allocate",
            r"\bMemoryError\b",
        ),
        "out of memory",
        "raise resources.{stage}.mem",
        resume_options="--resources.{stage}.mem 64G",
    ),
    Cause(
        "no environment",
        (
            r"slurm_script: line \d+: .*: (No such file or directory|Permission denied|cannot execute)",
            r"exec: .*: (not found|cannot execute)",
            r"ModuleNotFoundError: No module named",
        ),
        "Python or one of its packages is missing",
        "set python and setup in the cluster profile, or check the image: amlaunch image check IMAGE",
    ),
    Cause(
        "broken GPU",
        (
            r"uncorrectable ECC",
            r"ECC error",
            r"\bXid\b",
            r"GPU has fallen off the bus",
            r"unspecified launch failure",
            r"CUDA error: (unknown|hardware|an illegal instruction)",
            r"no CUDA-capable device",
            r"Found no NVIDIA driver",
            r"CUDA driver initialization failed",
            r"CUDA unknown error",
            r"No CUDA GPUs are available",
        ),
        "the GPU or its driver failed",
        restart=True,
        avoid_host=True,
    ),
    Cause(
        "network",
        (
            r"ncclSystemError",
            r"ncclRemoteError",
            r"ncclInternalError",
            r"NCCL (error|WARN.*failed)",
            r"Watchdog caught collective operation timeout",
            r"Connection (closed|reset) by peer",
            r"Connection refused",
            r"Socket closed",
            r"recvValue failed",
            r"Broken pipe",
            r"No route to host",
            r"Network is unreachable",
        ),
        "ranks lost their connection to each other",
        restart=True,
        avoid_host=True,
    ),
    Cause(
        "node",
        (r"Stale file handle", r"Input/output error", r"Transport endpoint is not connected", r"Bus error"),
        "the node or its file system failed",
        restart=True,
        avoid_host=True,
    ),
)
"""Searched in this order, because a full disk breaks connections, too."""


def cause_of(text: str) -> Cause | None:
    """Return the first cause that matches ``text``."""
    for cause in CAUSES:
        if re.search("|".join(cause.patterns), text, re.IGNORECASE):
            return cause
    return None


def cause_with(kind: str) -> Cause | None:
    """Return the cause of this kind; None if there is none."""
    return next((cause for cause in CAUSES if cause.kind == kind), None)


def needs_fix(kind: str) -> bool:
    """Return True if an element that failed in this way fails again until recipe, code, input or profile change."""
    if kind == EXCEPTION:
        return True
    failure = cause_with(kind) or FAILURES_BY_KIND.get(kind)
    return failure is not None and not failure.restart


def resume_options_for(kind: str, stage: str) -> str:
    """Return the options of ``amlaunch resume`` that remedy a kind of failure; empty if there are none."""
    cause = cause_with(kind)
    return cause.resume_options.replace("{stage}", stage) if cause else ""


def exception_of(text: str) -> str:
    """Return the line that names the last uncaught exception in a log: ``NameError: name 'x' is not defined``.

    Empty if the log has no complete traceback.
    """
    _, header, rest = text.rpartition(TRACEBACK)
    lines = rest.splitlines()[1:] if header else []
    line = next((line for line in lines if line.strip() and not line[0].isspace()), "")
    return line if len(line) <= MAX_REASON_CHARACTERS else f"{line[:MAX_REASON_CHARACTERS]}…"


def tail_of(log: Path) -> str:
    """Return the last part of a log; empty if there is no such file."""
    try:
        with open(log, "rb") as handle:
            handle.seek(max(0, os.fstat(handle.fileno()).st_size - TAIL_BYTES))
            return handle.read().decode(errors="replace")
    except OSError:
        return ""
