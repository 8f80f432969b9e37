"""What Slurm says of the user's jobs: one squeue and at most one sacct for everything, shared by all calls for ten seconds."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from amlaunch.launcher.errors import SlurmError
from amlaunch.launcher.slurm import client
from amlaunch.launcher.slurm.client import JobInfo
from amlaunch.recipes.files import Lock, fingerprint, read_object, write_json

MAX_AGE = 10.0
"""Seconds that an answer is good for."""
KEPT_SECONDS = 3600.0
CHANGED = "changed"
"""A file whose time says when this user last changed something."""


class Queue:
    """A view of the queue, no older than ``max_age`` seconds; nothing is asked before it is needed.

    Several processes share it through a file, so that ten terminals with
    ``amlaunch status`` are one squeue.
    """

    def __init__(self, max_age: float = MAX_AGE, cache: Path | None = None):
        self.max_age = max_age
        self.file = cache or cache_file()
        self.problems: list[str] = []
        """What did not answer, and what it said."""
        self.time = 0.0
        """When the answer that :attr:`jobs` gives was asked for."""
        self._jobs: dict[str, JobInfo] | None = None
        self._asked = False
        self._past: dict[str, JobInfo] = {}
        self._past_asked: set[str] = set()
        self._cluster: str | None = None

    @property
    def jobs(self) -> dict[str, JobInfo] | None:
        """All jobs that Slurm still knows, by id; None where squeue does not answer."""
        if not self._asked:
            self._asked = True
            self._jobs = self._shared("squeue", "", client.squeue)
        return self._jobs

    def is_elsewhere(self, cluster: str) -> bool:
        """Whether jobs of a cluster by this name are not those that :attr:`jobs` speaks of. A silent Slurm is not another one."""
        if self._cluster is None and cluster:
            self._cluster = self._name()
        return bool(cluster and self._cluster and cluster != self._cluster)

    def _name(self) -> str:
        """What the cluster that is asked is called; it is kept for an hour. Empty where Slurm does not answer."""
        kept = self.file.with_name("name.json")
        old = read_object(kept)
        if 0 <= time.time() - old.get("time", 0.0) < KEPT_SECONDS and isinstance(old.get("name"), str):
            return str(old["name"])
        try:
            name = client.cluster_name() if self.jobs is not None else ""  # whoever is silent is not waited for twice
        except SlurmError:
            return ""
        if name:
            with suppress(OSError):
                write_json(kept, {"time": time.time(), "name": name}, durable=False)
        return name

    def ask_past(self, arrays: Iterable[str]) -> None:
        """One sacct for all ``arrays`` that have not been asked for yet."""
        wanted = sorted(set(arrays) - self._past_asked)
        if wanted:
            self._past_asked.update(wanted)
            self._past.update(self._shared("sacct", ",".join(wanted), lambda: client.sacct(wanted)) or {})

    def past(self, job: str) -> JobInfo | None:
        """What accounting said of a job (see :meth:`ask_past`)."""
        return self._past.get(job)

    def job(self, job: str) -> JobInfo | None:
        """What is known of a job, from the queue or else from accounting."""
        return (self.jobs or {}).get(job) or self.past(job)

    def _shared(self, name: str, question: str, ask: Any) -> dict[str, JobInfo] | None:
        """The answer of another call that is still fresh, else a new one, kept for others."""
        lock = Lock(self.file.with_name(f"{name}.lock"))
        kept = self.file.with_name(f"{name}-{fingerprint(question)}.json")
        try:
            lock.acquire(wait=True)  # who comes meanwhile gets our answer
        except OSError:
            return self._asking(ask)[0]  # no home to keep anything in
        try:
            old = read_object(kept)
            if old.get("question") == question and self._is_fresh(old.get("time", 0.0)):
                answer, problem = old.get("jobs"), old.get("problem")
                self.problems += [problem] if problem else []
                self.time = max(self.time, old["time"])
                return None if answer is None else {row[0]: JobInfo(*row) for row in answer}
            asked = self.time = time.time()  # what happens while Slurm answers may not be in the answer
            jobs, problem = self._asking(ask)
            rows = None if jobs is None else [dataclasses.astuple(job) for job in jobs.values()]
            write_json(kept, {"time": asked, "question": question, "problem": problem, "jobs": rows}, durable=False)
            _drop_old(kept.parent)
            return jobs
        except OSError:
            return self._asking(ask)[0]
        finally:
            lock.release()

    def _is_fresh(self, asked: float) -> bool:
        """Whether an answer is young enough, and was asked for after the last change that we made ourselves."""
        try:
            changed = self.file.with_name(CHANGED).stat().st_mtime
        except OSError:
            changed = 0.0
        return 0 <= time.time() - asked < self.max_age and asked > changed

    def _asking(self, ask: Any) -> tuple[dict[str, JobInfo] | None, str]:
        try:
            return ask(), ""
        except SlurmError as error:
            self.problems.append(str(error))
            return None, str(error)


def cache_file() -> Path:
    """Where answers are kept: by user, and by the cluster that is asked; machines of several clusters may share one home."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return (
        root
        / "amlaunch"
        / f"cluster-{fingerprint([client.configured_name() or platform.node(), *(os.environ.get(name) for name in client.KEPT_VARIABLES)])}"
        / "queue"
    )


def _drop_old(folder: Path) -> None:
    """Answers to questions that nobody asks any more."""
    for path in folder.glob("s*-*.json"):
        if time.time() - path.stat().st_mtime > KEPT_SECONDS:
            path.unlink(missing_ok=True)


def forget() -> None:
    """Have the next question asked anew, also one that another process is asking just now: something was submitted or cancelled."""
    changed = cache_file().with_name(CHANGED)
    with suppress(OSError):
        changed.parent.mkdir(parents=True, exist_ok=True)
        changed.touch()
