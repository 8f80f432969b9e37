"""Runs one element on the host: starts its ranks, passes on "stop soon", waits, and says how it ended.

This is the callable that submitit starts. It knows processes and files, and
nothing of what the stage does.
"""

from __future__ import annotations

import os
import platform
import signal
import socket
import subprocess
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import containers
from launcher.plan import Element, Plan, Stage
from launcher.state import DONE, FAILED, PENDING, STOPPED
from launcher.store import read_plan
from recipes.errors import BAD_INPUT, GO_ON_LATER
from recipes.expand import Unset, expand, variables
from recipes.files import Lock, append_json_line, is_locked, read_json, read_json_lines, write_json
from recipes.process import PARENT_VARIABLE, python_command
from recipes.rundir import ElementDir, RunDir

POLL_SECONDS = 0.05
GRACE_SECONDS = 120.0
"""How long ranks may take to save after "stop soon"."""
SIBLING_SECONDS = 5.0
"""How long the other ranks may take to notice that one has failed."""


KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
"""For glibc, on the CPU: else it hands every large tensor back to the kernel and faults it in again (docs/log.md)."""


@dataclass(frozen=True)
class Assignment:
    """What one start of an element was given on this host."""

    cpus: int
    gpus: tuple[str, ...]
    watch: str | None = None
    """A lock that its starter holds; when nobody does any more, the element stops soon."""


@dataclass(frozen=True)
class Attempt:
    """One start of one element."""

    run: RunDir
    plan: Plan
    stage: Stage
    element: Element
    given: Assignment
    lock: Lock
    number: int

    @property
    def folder(self) -> ElementDir:
        """Where the element keeps its files."""
        return self.run.element(self.stage.name, self.element.name)

    def record(self, event: str, **more: Any) -> None:
        """Add a line to ``attempts.jsonl``."""
        append_json_line(self.folder.attempts, {"event": event, "attempt": self.number, "time": time.time(), **more})


class Stopping:
    """Whether the ranks should leave, and since when."""

    def __init__(self, folder: ElementDir, watch: Path | None):
        self.folder = folder
        self.watch = watch
        self.since: float | None = None

    def ask(self, *_: Any) -> None:
        """Leave word for the ranks (also a signal handler)."""
        if self.since is None:
            self.since = time.monotonic()
            self.folder.stop.touch()

    def look(self) -> bool:
        """Whether to stop: asked by signal, by the stop file, or because the starter is gone."""
        gone = self.watch is not None and not is_locked(self.watch)
        if self.since is None and (gone or self.folder.stop.exists()):
            self.ask()
        return self.since is not None


def run_element(run_root: str, stage_name: str, element_name: str, given: Assignment) -> str:
    """Carry out one attempt; returns its outcome, which is also the last line of ``attempts.jsonl``.

    An element that another live driver has is left to it (``"pending"``).
    """
    run = RunDir(Path(run_root))
    plan = read_plan(run)
    stage = plan.stage(stage_name)
    element = next(element for element in stage.elements if element.name == element_name)
    folder = run.element(stage_name, element_name)
    lock = Lock(folder.lock)
    if not lock.acquire():
        return PENDING
    stopping = Stopping(folder, Path(given.watch) if given.watch else None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, stopping.ask)
    for leftover in (folder.stop, folder.result, folder.done):
        leftover.unlink(missing_ok=True)
    number = 1 + sum(line.get("event") == "start" for line in read_json_lines(folder.attempts))
    return carry_out(Attempt(run, plan, stage, element, given, lock, number), stopping)


def carry_out(attempt: Attempt, stopping: Stopping) -> str:
    """Start the ranks, wait for them, and write down how it ended."""
    started = time.monotonic()
    attempt.record("start", host=platform.node(), pid=os.getpid(), job=os.environ.get("SUBMITIT_LOCAL_JOB_ID"))
    try:
        with ExitStack() as files:
            codes, first = wait_for(_start_ranks(attempt, files), stopping)
    except (OSError, ValueError, Unset) as error:  # no such program, a full disk, a variable that is not set
        what = f"the variable {error.name} is not set (container.env)" if isinstance(error, Unset) else str(error)
        attempt.record("end", outcome=FAILED, retry=True, reason=f"the ranks could not be started: {what}")
        return FAILED
    result = read_json(attempt.folder.result)
    end = explain(attempt, codes, classify(codes, first, result, asked=stopping.since is not None))
    seconds = round(time.monotonic() - started, 3)
    if end["outcome"] == DONE:
        write_json(attempt.folder.done, {"time": time.time(), "attempt": attempt.number, "seconds": seconds, **(result or {})})
    attempt.record("end", seconds=seconds, exit_codes=codes, **end)
    return str(end["outcome"])


def explain(attempt: Attempt, codes: list[int], end: dict[str, Any]) -> dict[str, Any]:
    """Bad input is said by one rank for all: take its words, and point to its log."""
    if BAD_INPUT not in codes:
        return end
    for rank, code in enumerate(codes):
        log = attempt.folder.log(attempt.number, rank)
        said = [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]
        if code == BAD_INPUT and said:
            return {**end, "rank": rank, "reason": said[-1].removeprefix("error: ")}
    return end


def _start_ranks(attempt: Attempt, files: ExitStack) -> list[subprocess.Popen[bytes]]:
    command = [*python_command(attempt.element.module), *attempt.element.arguments]
    wanted = {key: str(expand(value, variables())) for key, value in attempt.plan.env.items()}
    argv, extra = containers.launch("none", containers.Image(env=wanted), command)
    shared = {**os.environ, **extra, **_environment(attempt)}
    ranks = []
    for rank in range(attempt.stage.needs.tasks_per_node):
        log = attempt.folder.log(attempt.number, rank)
        log.parent.mkdir(parents=True, exist_ok=True)
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


def _environment(attempt: Attempt) -> dict[str, str]:
    """What all ranks share: where to meet, what to use, which code to run."""
    tasks = attempt.stage.needs.tasks_per_node
    path = [str(attempt.run.code), os.environ.get("PYTHONPATH", "")]
    env = {
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        # Without it gloo looks up the host's own name, which many machines cannot resolve.
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, attempt.given.cpus // tasks))),
        "CUDA_VISIBLE_DEVICES": ",".join(attempt.given.gpus),
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONSAFEPATH": "1",
        PARENT_VARIABLE: str(os.getpid()),
    }
    return env if attempt.given.gpus else {**KEEP_MEMORY, **_given(KEEP_MEMORY), **env, "AMLAUNCH_DEVICE": "cpu"}


def _given(names: Iterable[str]) -> dict[str, str]:
    """What the user has set of ``names``."""
    return {name: os.environ[name] for name in names if name in os.environ}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(ranks: list[subprocess.Popen[bytes]], stopping: Stopping) -> tuple[list[int], int | None]:
    """``(exit codes, the rank that failed first)``, once all have ended.

    One rank that fails takes the others with it, "stop soon" has a time limit.
    """
    forwarded = False
    failed_at = 0.0
    first: int | None = None
    while None in [rank.poll() for rank in ranks]:  # a list: every rank is asked each time
        now = time.monotonic()
        if stopping.look() and not forwarded:
            _signal(ranks, signal.SIGTERM)
            forwarded = True
        if first is None and any(rank.returncode for rank in ranks):
            first, failed_at = _culprit([rank.returncode for rank in ranks]), now
        overdue = stopping.since is not None and now - stopping.since > GRACE_SECONDS
        if overdue or (first is not None and now - failed_at > SIBLING_SECONDS):
            _signal(ranks, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    codes = [rank.returncode for rank in ranks]
    return codes, _culprit(codes) if first is None else first


def _signal(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _culprit(codes: list[int | None]) -> int | None:
    """Of ranks that ended within one poll, the one to look at: bad input, then killed from outside, then an error.

    A rank that loses its peer fails with an error of its own a moment later.
    """
    kinds = (lambda c: c == BAD_INPUT, lambda c: c < 0, lambda c: c not in (0, GO_ON_LATER))
    for is_kind in kinds:
        for rank, code in enumerate(codes):
            if code is not None and is_kind(code):
                return rank
    return None


def classify(codes: list[int], first: int | None, result: dict[str, Any] | None, asked: bool = False) -> dict[str, Any]:
    """``outcome``, ``reason`` and the ``rank`` to look at, from exit codes (negative: a signal's number).

    ``asked``: to stop. A rank that our SIGTERM ended by itself had not begun to listen, and so had nothing to save.
    """
    if all(code == 0 for code in codes):
        if result is None:
            return {"outcome": FAILED, "reason": "exited 0 but left no result", "rank": 0}
        return {"outcome": DONE}
    if first is None or all(code in (0, GO_ON_LATER, -signal.SIGTERM if asked else 0) for code in codes):
        return {"outcome": STOPPED, "reason": "stopped on request"}
    code = codes[first]
    if code == BAD_INPUT:
        return {"outcome": FAILED, "retry": False, "reason": "the recipe or its input cannot work", "rank": first}
    if code < 0:
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        reason = f"rank {first} was killed by {signal.Signals(-code).name}{hint}"
    else:
        reason = f"rank {first} exited with code {code}"
    return {"outcome": FAILED, "retry": True, "reason": reason, "rank": first}
