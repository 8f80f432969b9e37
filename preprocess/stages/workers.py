"""Worker processes that share nothing: each makes whole parts, and says how far it is; no token passes between them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from amlaunch.preprocess.errors import Failure, what_the_disk_says
from amlaunch.preprocess.progress import StopRequested, stop_on_signals
from amlaunch.recipes.errors import GO_ON_LATER, BadInput
from amlaunch.recipes.python_process import PARENT_VARIABLE, die_with_parent

FORK = multiprocessing.get_context("fork")
"""A worker begins with the vocabulary that its parent has loaded."""
GRACE_SECONDS = 5.0
"""How long workers may take to drop their shards; one that is deep in a huge text does not hear us."""
BEAT_SECONDS = 0.25
LOOK_SECONDS = 0.2

Work = Callable[[Any, Callable[[str, Any], None]], Any]
"""Carries out one task; may ``say("beat", …)`` and ``say("line", …)`` on the way."""


@dataclass
class Worker:
    """A process, and the way to it."""

    number: int
    process: BaseProcess
    wire: connection.Connection
    task: Any = None


def cpus() -> int:
    """CPUs that this process may use: what Slurm or the kernel gives it, not what the machine has."""
    given = os.environ.get("SLURM_CPUS_PER_TASK", "")
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(int(given), there) if given.isdigit() and int(given) else there


def run_tasks(
    count: int,
    next_task: Callable[[], Any],
    start: Callable[[], Work],
    hear: Callable[[int, str, Any], None],
    idle: Callable[[], None],
) -> None:
    """Have ``count`` workers carry out tasks until ``next_task`` gives None.

    ``start`` runs once in each worker. ``hear`` gets (worker, kind, value): ``beat`` and ``line`` as the work says
    them, ``done`` with its value. ``idle`` is called a few times a second and may raise to end it all.
    Raises what a worker raised: BadInput, Failure, OSError or StopRequested. No worker outlives this call.
    """
    with started(count, start) as workers:
        for worker in workers:
            _give(worker, next_task())
        while busy := [worker for worker in workers if worker.task is not None]:
            for ready in connection.wait([worker.wire for worker in busy], LOOK_SECONDS):
                worker = next(worker for worker in busy if worker.wire is ready)
                kind, value = _message(worker)
                if kind == "failed":
                    raise value
                hear(worker.number, kind, value)
                if kind == "done":
                    worker.task = None
            for worker in workers:  # what is known now may make more tasks worth doing
                if worker.task is None:
                    _give(worker, next_task())
            idle()


def _give(worker: Worker, task: Any) -> None:
    if task is not None:
        worker.task = task
        try:
            worker.wire.send(task)
        except (BrokenPipeError, ConnectionResetError):
            _message(worker)  # it has ended; says how


def _message(worker: Worker) -> tuple[str, Any]:
    try:
        kind, value = worker.wire.recv()
        return kind, value
    except (EOFError, ConnectionResetError):
        worker.process.join(GRACE_SECONDS)
        code = worker.process.exitcode
        if code == GO_ON_LATER:
            raise StopRequested("a worker was told to stop") from None
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"ended with code {code}"
        hint = " (did it need more memory than there is?)" if code == -signal.SIGKILL else ""
        raise Failure(f"worker {worker.number} was {how}{hint} while it made part {worker.task[0]}") from None


@contextmanager
def started(count: int, start: Callable[[], Work]) -> Iterator[list[Worker]]:
    """Workers that wait for tasks, and are gone at the end whatever happened."""
    workers: list[Worker] = []
    try:
        for number in range(count):
            ours, theirs = FORK.Pipe()
            process = FORK.Process(
                target=_serve, args=(theirs, [ours, *(w.wire for w in workers)], start, os.getpid()), daemon=True
            )
            process.start()
            theirs.close()
            workers.append(Worker(number, process, ours))
        yield workers
        for worker in workers:
            worker.wire.close()
            worker.process.join(GRACE_SECONDS)
    finally:
        end(workers)


def end(workers: list[Worker]) -> None:
    """Ask those that live to drop what they do, and kill those that do not listen."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for worker in workers:
            if worker.process.is_alive() and worker.process.pid:
                os.kill(worker.process.pid, number)
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))


def _serve(
    wire: connection.Connection, others: list[connection.Connection], start: Callable[[], Work], parent: int
) -> None:
    """A worker's life."""
    for other in others:
        other.close()
    try:
        stop_on_signals()
        os.environ[PARENT_VARIABLE] = str(parent)
        die_with_parent()
        _serve_tasks(wire, start)
        os._exit(0)  # not through the interpreter's end, where a signal would still be heard
    except StopRequested:
        os._exit(GO_ON_LATER)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent has no more to do, or is gone
        os._exit(0)


def _serve_tasks(wire: connection.Connection, start: Callable[[], Work]) -> None:
    try:
        work = start()
        while True:
            task = wire.recv()
            wire.send(("done", work(task, _speaker(wire))))
    except (BadInput, Failure) as error:
        wire.send(("failed", error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except OSError as error:
        wire.send(("failed", Failure(what_the_disk_says(error))))
    except Exception as error:
        import traceback

        traceback.print_exc()
        wire.send(("failed", Failure(f"{type(error).__name__}: {error}")))


def _speaker(wire: connection.Connection) -> Callable[[str, Any], None]:
    last = 0.0

    def say(kind: str, value: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if kind == "beat" and now - last < BEAT_SECONDS:
            return
        last = now
        wire.send((kind, value))

    return say
