"""Every file name of a run directory, in one place.

The writers (preprocess, trainer, driver) and the readers (status, logs) share
nothing but these names: no database, no daemon.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amlaunch.recipes.files import write_json


@dataclass(frozen=True)
class ElementDir:
    """The folder of one array element of one stage: ``stages/<stage>/<element>``."""

    root: Path

    @property
    def attempts(self) -> Path:
        """One JSON line when an attempt starts and one when it ends."""
        return self.root / "attempts.jsonl"

    @property
    def done(self) -> Path:
        """Exists only when the element finished whole; names its outputs and their sizes."""
        return self.root / "done.json"

    @property
    def progress(self) -> Path:
        """The newest heartbeat."""
        return self.root / "progress.json"

    @property
    def verdicts(self) -> Path:
        """A file of each node on which the newest attempt's containers could not start."""
        return self.root / "verdicts"

    @property
    def metrics(self) -> Path:
        """One JSON line a training step."""
        return self.root / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """What the stage itself says of its finished work; the driver copies it into ``done.json``."""
        return self.root / "result.json"

    @property
    def stop(self) -> Path:
        """Asks the element to save and leave at the next boundary."""
        return self.root / "stop"

    @property
    def lock(self) -> Path:
        """Held by the driver and every process it started."""
        return self.root / "lock"

    def log(self, attempt: int, rank: int | None = None) -> Path:
        """Output of a rank, or of the driver itself where ``rank`` is None."""
        who = "driver" if rank is None else f"rank{rank}"
        return self.root / "logs" / f"attempt{attempt}.{who}.log"


SHARED_STAGES = ("preprocess", "verify")
"""Stages that make the shards. Where the shards' folder is named by what they are made of, the stages' own files lie
beside them, and every run with the same data shares them."""


@dataclass(frozen=True)
class RunDir:
    """One run: ``runs/<run-id>``."""

    root: Path
    shards: Path | None = None
    """Folder of shards that runs share; None: where the run's ``shared`` link leads, if it has one."""

    @property
    def recipe(self) -> Path:
        """The resolved recipe, overrides included, placeholders kept."""
        return self.root / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """Stages, elements, dependencies, resources."""
        return self.root / "plan.json"

    @property
    def provenance(self) -> Path:
        """Command line, versions, git state, host, user, time."""
        return self.root / "provenance.json"

    @property
    def code(self) -> Path:
        """The snapshot of our packages that the processes run."""
        return self.root / "code"

    @property
    def lock(self) -> Path:
        """Held by the ``amlaunch local`` process that drives the run."""
        return self.root / "lock"

    @property
    def stop(self) -> Path:
        """Asks that process to save and stop, from a machine where no signal reaches it."""
        return self.root / "stop"

    @property
    def jobs(self) -> Path:
        """What was submitted: submitit's files on this machine, one folder for each array on a cluster."""
        return self.root / "jobs"

    @property
    def environment(self) -> Path:
        """Secrets that jobs on other nodes need; readable by the user alone."""
        return self.root / "environment.json"

    @property
    def compile_cache(self) -> Path:
        """What ``torch.compile`` made, for the next start and the other elements; torch's own files, safe for many writers."""
        return self.root / "compile-cache"

    @property
    def data(self) -> Path:
        """Link to the shards that this run reads."""
        return self.root / "data"

    @property
    def shared(self) -> Path:
        """Link to the folder of shards that this run shares with others."""
        return self.root / "shared"

    def home(self, stage: str) -> Path:
        """Where a stage keeps its files and its submissions: in the run, or beside the shards that runs share."""
        if stage not in SHARED_STAGES:
            return self.root
        return self.shards or (self.shared if self.shared.is_symlink() else self.root)

    def stage(self, stage: str) -> Path:
        """The folder of a stage's elements."""
        return self.home(stage) / "stages" / stage

    def element(self, stage: str, element: str) -> ElementDir:
        """The folder of one element."""
        return ElementDir(self.stage(stage) / element)

    def checkpoints(self, element: str) -> Path:
        """Checkpoints of one train element."""
        return self.root / "checkpoints" / element

    def export(self, element: str) -> Path:
        """Hugging Face folder of one train element."""
        return self.root / "export" / element


class Heartbeat:
    """Writes ``progress.json``, at most once in ``interval`` seconds unless it is the last word.

    Fields: ``time`` (Unix seconds), ``unit`` of ``done`` and ``total``, ``rate``
    (tokens a second), ``eta_s``, ``message``, and what the stage adds (loss, …).
    """

    def __init__(self, path: Path | None, interval: float = 1.0):
        self.path = path
        self.interval = interval
        self._last = 0.0

    def beat(
        self,
        *,
        unit: str,
        done: int,
        total: int | None,
        rate: float | None = None,
        eta_s: float | None = None,
        last: bool = False,
        **more: Any,
    ) -> None:
        """Say how far the element is."""
        now = time.time()
        if self.path is None or (not last and now - self._last < self.interval):
            return
        self._last = now
        fields = {"time": now, "unit": unit, "done": done, "total": total, "rate": rate, "eta_s": eta_s, **more}
        write_json(self.path, fields, durable=last)
