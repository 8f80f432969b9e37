"""Worker processes that share nothing: each makes entire parts and reports progress; no tokens pass between them."""

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

from amlaunch.preprocess.errors import ExternalFailure, describe_os_error
from amlaunch.preprocess.progress import StopRequested, stop_on_signals
from amlaunch.recipes.errors import RESUMABLE, BadInput
from amlaunch.recipes.python_process import PARENT_VARIABLE, die_with_parent

FORK = multiprocessing.get_context("fork")
"""A forked worker starts with the vocabulary that its parent has loaded."""
GRACE_SECONDS = 5.0
"""Time for workers to drop their shards; one that is deep inside a huge text does not react to signals."""
REPORT_SECONDS = 0.25
"""Between two progress messages of a worker."""
POLL_SECONDS = 0.2
"""Longest wait for a message before ``on_idle`` is called."""

Send = Callable[[str, Any], None]
"""Sends a message (kind, value) to the parent."""
Work = Callable[[Any, Send], Any]
"""Runs one task and returns its result; may send ``progress`` and ``log`` messages meanwhile."""


@dataclass
class Worker:
    """A worker process and the connection to it."""

    number: int
    process: BaseProcess
    pipe: connection.Connection
    task: Any = None


def available_cpus() -> int:
    """Return the CPUs that this process may use: those that Slurm or the kernel allows, not all of the machine."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    slurm_cpus = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(int(slurm_cpus), usable) if slurm_cpus.isdigit() and int(slurm_cpus) else usable


def run_tasks(
    count: int,
    next_task: Callable[[], Any],
    start: Callable[[], Work],
    on_message: Callable[[str, Any], None],
    on_idle: Callable[[], None],
) -> None:
    """Run tasks in ``count`` workers until ``next_task`` returns None.

    ``start`` runs once in each worker. ``on_message`` gets (kind, value): ``progress`` and ``log`` as the work sends
    them, ``done`` with its result. ``on_idle`` is called a few times a second and may raise to stop everything. Raises
    what a worker raised: BadInput, ExternalFailure, OSError or StopRequested. No worker outlives this call.
    """
    with start_workers(count, start) as workers:
        _assign_tasks(workers, next_task)
        while busy := [worker for worker in workers if worker.task is not None]:
            for ready in connection.wait([worker.pipe for worker in busy], POLL_SECONDS):
                worker = next(worker for worker in busy if worker.pipe is ready)
                kind, value = _receive(worker)
                if kind == "failed":
                    raise value
                on_message(kind, value)
                if kind == "done":
                    worker.task = None
            # The messages may have shown that more tasks are needed.
            _assign_tasks(workers, next_task)
            on_idle()


def _assign_tasks(workers: list[Worker], next_task: Callable[[], Any]) -> None:
    for worker in workers:
        if worker.task is None and (task := next_task()) is not None:
            worker.task = task
            try:
                worker.pipe.send(task)
            except (BrokenPipeError, ConnectionResetError):
                # The worker has ended: raise the reason.
                _receive(worker)


def _receive(worker: Worker) -> tuple[str, Any]:
    try:
        kind, value = worker.pipe.recv()
        return kind, value
    except (EOFError, ConnectionResetError):
        worker.process.join(GRACE_SECONDS)
        code = worker.process.exitcode
        if code == RESUMABLE:
            raise StopRequested("a worker received a stop signal") from None
        raise ExternalFailure(
            f"worker {worker.number} {_describe_exit(code)} while it made part {worker.task[0]}"
        ) from None


def _describe_exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exited with code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


@contextmanager
def start_workers(count: int, start: Callable[[], Work]) -> Iterator[list[Worker]]:
    """Start workers that wait for tasks; on exit, none is left."""
    workers: list[Worker] = []
    try:
        for number in range(count):
            parent_end, worker_end = FORK.Pipe()
            # A fork inherits the parent's ends of all earlier pipes; the worker must close them.
            inherited = [parent_end, *(worker.pipe for worker in workers)]
            process = FORK.Process(target=_serve, args=(worker_end, inherited, start, os.getpid()), daemon=True)
            process.start()
            worker_end.close()
            workers.append(Worker(number, process, parent_end))
        yield workers
        for worker in workers:
            worker.pipe.close()
            worker.process.join(GRACE_SECONDS)
    finally:
        stop_workers(workers)


def stop_workers(workers: list[Worker]) -> None:
    """Ask live workers to drop their shards, and kill those that do not react."""
    for stop_signal in (signal.SIGTERM, signal.SIGKILL):
        for worker in workers:
            if worker.process.is_alive() and worker.process.pid:
                os.kill(worker.process.pid, stop_signal)
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))


def _serve(
    parent_end: connection.Connection,
    inherited: list[connection.Connection],
    start: Callable[[], Work],
    parent: int,
) -> None:
    """Run in a worker: carry out tasks until the parent closes the connection."""
    for other in inherited:
        other.close()
    try:
        stop_on_signals()
        os.environ[PARENT_VARIABLE] = str(parent)
        die_with_parent()
        _serve_tasks(parent_end, start)
        # Skip the interpreter's shutdown, in which a signal would still be handled.
        os._exit(0)
    except StopRequested:
        os._exit(RESUMABLE)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        # The parent has no more tasks, or has ended.
        os._exit(0)


def _serve_tasks(parent_end: connection.Connection, start: Callable[[], Work]) -> None:
    try:
        work = start()
        while True:
            task = parent_end.recv()
            parent_end.send(("done", work(task, _throttled_send(parent_end))))
    except (BadInput, ExternalFailure) as error:
        parent_end.send(("failed", error))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except OSError as error:
        parent_end.send(("failed", ExternalFailure(describe_os_error(error))))
    except Exception as error:
        import traceback

        traceback.print_exc()
        parent_end.send(("failed", ExternalFailure(f"{type(error).__name__}: {error}")))


def _throttled_send(parent_end: connection.Connection) -> Send:
    """Return a function that sends all messages, except progress within REPORT_SECONDS of the last message."""
    last = 0.0

    def send(kind: str, value: Any) -> None:
        nonlocal last
        now = time.monotonic()
        if kind == "progress" and now - last < REPORT_SECONDS:
            return
        last = now
        parent_end.send((kind, value))

    return send
