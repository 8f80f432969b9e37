"""Slurm's view of the user's jobs: one squeue and at most one sacct for everything.

All calls within ten seconds share the answers.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from amlaunch.launcher.errors import SlurmError
from amlaunch.launcher.slurm import client
from amlaunch.launcher.slurm.client import JobInfo
from amlaunch.recipes.files import Lock, fingerprint, read_object, write_json

MAX_AGE_SECONDS = 10.0
"""An answer is reused for this long."""
KEPT_SECONDS = 3600.0
CHANGED_FILE = "changed"
"""A file whose modification time says when this user last submitted or cancelled something."""

Jobs = dict[str, JobInfo]


class Queue:
    """A view of the queue, no older than ``max_age`` seconds; nothing is asked before it is needed.

    Several processes share it through a file, so that ten terminals with ``amlaunch status`` cause one squeue.
    """

    def __init__(self, max_age: float = MAX_AGE_SECONDS, cache: Path | None = None):
        self.max_age = max_age
        self.file = cache or cache_file()
        self.problems: list[str] = []
        """Messages of the commands that failed or did not answer."""
        self.time = 0.0
        """The time at which the answer in :attr:`jobs` was requested."""
        self._jobs: Jobs | None = None
        self._has_asked = False
        self._past: Jobs = {}
        self._past_asked: set[str] = set()
        self._cluster: str | None = None

    @property
    def jobs(self) -> Jobs | None:
        """All jobs that Slurm still knows, by ID; None if squeue does not answer."""
        if not self._has_asked:
            self._has_asked = True
            self._jobs = self._shared("squeue", "", client.squeue)
        return self._jobs

    def is_elsewhere(self, cluster: str) -> bool:
        """Return True if :attr:`jobs` belong to another cluster than ``cluster``; False if Slurm does not answer."""
        if self._cluster is None and cluster:
            self._cluster = self._cluster_name()
        return bool(cluster and self._cluster and cluster != self._cluster)

    def _cluster_name(self) -> str:
        """Return the name of the current cluster, cached for an hour; empty if Slurm does not answer."""
        cache = self.file.with_name("name.json")
        cached = read_object(cache)
        if 0 <= time.time() - cached.get("time", 0.0) < KEPT_SECONDS and isinstance(cached.get("name"), str):
            return str(cached["name"])
        # Do not wait twice for a Slurm that does not answer.
        if self.jobs is None:
            return ""
        try:
            name = client.cluster_name()
        except SlurmError:
            return ""
        if name:
            with suppress(OSError):
                write_json(cache, {"time": time.time(), "name": name}, durable=False)
        return name

    def query_accounting(self, arrays: Iterable[str]) -> None:
        """Ask accounting about the arrays that it has not been asked about yet, with one sacct."""
        wanted = sorted(set(arrays) - self._past_asked)
        if wanted:
            self._past_asked.update(wanted)
            self._past.update(self._shared("sacct", ",".join(wanted), lambda: client.sacct(wanted)) or {})

    def accounting_record(self, job: str) -> JobInfo | None:
        """Return accounting's record of a job (see :meth:`query_accounting`)."""
        return self._past.get(job)

    def job(self, job: str) -> JobInfo | None:
        """Return what the queue, or else accounting, knows of a job."""
        return (self.jobs or {}).get(job) or self.accounting_record(job)

    def _shared(self, command: str, question: str, ask: Callable[[], Jobs]) -> Jobs | None:
        """Return another call's answer if it is still fresh, or else a new one, which is kept for others."""
        lock = Lock(self.file.with_name(f"{command}.lock"))
        cache = self.file.with_name(f"{command}-{fingerprint(question)}.json")
        try:
            # Processes that wait for the lock get our answer.
            lock.acquire(wait=True)
        except OSError:
            # No writable home folder.
            return self._ask(ask)[0]
        try:
            cached = read_object(cache)
            if cached.get("question") == question and self._is_fresh(cached.get("time", 0.0)):
                return self._cached_jobs(cached)
            # Taken before the call: what happens while Slurm answers may not be in the answer.
            self.time = time.time()
            jobs, problem = self._ask(ask)
            rows = None if jobs is None else [dataclasses.astuple(job) for job in jobs.values()]
            record = {"time": self.time, "question": question, "problem": problem, "jobs": rows}
            write_json(cache, record, durable=False)
            _delete_old(cache.parent)
            return jobs
        except OSError:
            return self._ask(ask)[0]
        finally:
            lock.release()

    def _cached_jobs(self, cached: dict[str, Any]) -> Jobs | None:
        if cached.get("problem"):
            self.problems.append(cached["problem"])
        self.time = max(self.time, cached["time"])
        rows = cached.get("jobs")
        return None if rows is None else {row[0]: JobInfo(*row) for row in rows}

    def _is_fresh(self, requested_at: float) -> bool:
        """Return True if an answer is young enough, and was requested after this user's last change."""
        try:
            changed = self.file.with_name(CHANGED_FILE).stat().st_mtime
        except OSError:
            changed = 0.0
        return 0 <= time.time() - requested_at < self.max_age and requested_at > changed

    def _ask(self, ask: Callable[[], Jobs]) -> tuple[Jobs | None, str]:
        try:
            return ask(), ""
        except SlurmError as error:
            self.problems.append(str(error))
            return None, str(error)


def cache_file() -> Path:
    """Return where answers are cached, by user and cluster; machines of several clusters may share one home."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cluster = [client.configured_name() or platform.node(), *map(os.environ.get, client.KEPT_VARIABLES)]
    return root / "amlaunch" / f"cluster-{fingerprint(cluster)}" / "queue"


def _delete_old(folder: Path) -> None:
    """Delete answers that are no longer used."""
    for path in folder.glob("s*-*.json"):
        if time.time() - path.stat().st_mtime > KEPT_SECONDS:
            path.unlink(missing_ok=True)


def invalidate_cache() -> None:
    """Discard cached answers, and answers being fetched by other processes: something was submitted or cancelled."""
    changed = cache_file().with_name(CHANGED_FILE)
    with suppress(OSError):
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.touch()
