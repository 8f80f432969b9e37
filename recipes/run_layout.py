"""Every file name of a run directory, in one place.

The writers (preprocess, trainer, driver) and the readers (status, logs) share nothing but these names: no database, no
daemon.
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
        """One JSON line when an attempt starts, and one when it ends."""
        return self.root / "attempts.jsonl"

    @property
    def done(self) -> Path:
        """Done marker: exists only if the element completed; lists its outputs and their sizes."""
        return self.root / "done.json"

    @property
    def progress(self) -> Path:
        """The latest heartbeat."""
        return self.root / "progress.json"

    @property
    def verdicts(self) -> Path:
        """One file for each node on which the latest attempt's containers could not start."""
        return self.root / "verdicts"

    @property
    def metrics(self) -> Path:
        """One JSON line for each training step."""
        return self.root / "metrics.jsonl"

    @property
    def result(self) -> Path:
        """The stage's own summary of its finished work; the driver copies it into ``done.json``."""
        return self.root / "result.json"

    @property
    def stop(self) -> Path:
        """Its existence asks the element to save and stop at the next step or part."""
        return self.root / "stop"

    @property
    def lock(self) -> Path:
        """Held by the driver and by every process that it started."""
        return self.root / "lock"

    def log(self, attempt: int, rank: int | None = None) -> Path:
        """Return the log of a rank, or of the driver if ``rank`` is None."""
        writer = "driver" if rank is None else f"rank{rank}"
        return self.root / "logs" / f"attempt{attempt}.{writer}.log"


SHARED_STAGES = ("preprocess", "verify")
"""Stages that make the shards. If the shards' folder is named by a fingerprint of its content, these stages keep their
files beside the shards, and all runs with the same data share them."""
READERS = "readers"
"""Folder beside shards with a record of each run that reads them: its real path."""


@dataclass(frozen=True)
class RunDir:
    """One run: ``runs/<run-id>``."""

    root: Path
    shards: Path | None = None
    """Folder of shards that runs share; None: the target of the run's ``shared`` link, if it has one."""

    @property
    def recipe(self) -> Path:
        """The resolved recipe: overrides applied, placeholders kept."""
        return self.root / "recipe.yaml"

    @property
    def recipe_json(self) -> Path:
        """The same recipe as JSON, for the stages: their image may lack PyYAML."""
        return self.root / "recipe.json"

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
        """The code snapshot that the processes run."""
        return self.root / "code"

    @property
    def lock(self) -> Path:
        """Held by the ``amlaunch local`` process that drives the run."""
        return self.root / "lock"

    @property
    def stop(self) -> Path:
        """Its existence asks that process to save and stop, from a machine whose signals do not reach it."""
        return self.root / "stop"

    @property
    def jobs(self) -> Path:
        """Submissions: submitit's files on this machine, one folder for each job array on a cluster."""
        return self.root / "jobs"

    @property
    def environment(self) -> Path:
        """Secrets that jobs on other nodes need; only the user can read it."""
        return self.root / "environment.json"

    @property
    def compile_cache(self) -> Path:
        """Cache of ``torch.compile`` for later attempts and other elements; torch makes it safe for many writers."""
        return self.root / "compile-cache"

    @property
    def data(self) -> Path:
        """Link to the shards that this run reads."""
        return self.root / "data"

    @property
    def shared(self) -> Path:
        """Link to the folder of shards that this run shares with other runs."""
        return self.root / "shared"

    def stage_home(self, stage: str) -> Path:
        """Return the folder of a stage's files and submissions: the run, or the shards' folder if runs share it."""
        if stage not in SHARED_STAGES:
            return self.root
        if self.shards is not None:
            return self.shards
        return self.shared if self.shared.is_symlink() else self.root

    def stage(self, stage: str) -> Path:
        """Return the folder of a stage's elements."""
        return self.stage_home(stage) / "stages" / stage

    def element(self, stage: str, element: str) -> ElementDir:
        """Return the folder of one element."""
        return ElementDir(self.stage(stage) / element)

    def checkpoints(self, element: str) -> Path:
        """Return the folder of one train element's checkpoints."""
        return self.root / "checkpoints" / element

    def export(self, element: str) -> Path:
        """Return the Hugging Face folder of one train element."""
        return self.root / "export" / element


class Heartbeat:
    """Writer of ``progress.json``, at most once every ``interval`` seconds, except for the last heartbeat.

    Fields: ``time`` (Unix seconds), ``unit`` of ``done`` and ``total``, ``rate`` (tokens a second), ``eta_s``,
    ``message``, and the stage's own (loss, …).
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
        """Record the progress of the element."""
        now = time.time()
        if self.path is None or (not last and now - self._last < self.interval):
            return
        self._last = now
        fields = {"time": now, "unit": unit, "done": done, "total": total, "rate": rate, "eta_s": eta_s, **more}
        write_json(self.path, fields, durable=last)
