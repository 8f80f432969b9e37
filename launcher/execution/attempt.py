"""One start of one element: what it was given on this host, and where it keeps its word."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amlaunch.launcher.specs.plan import Element, Plan, Stage
from amlaunch.recipes.files import Lock, append_json_line, read_object
from amlaunch.recipes.run_layout import ElementDir, RunDir

GRACE_SECONDS = 120.0


@dataclass(frozen=True)
class Assignment:
    """What one start of an element was given on this host."""

    cpus: int
    gpus: tuple[str, ...]
    watch: str | None = None
    """A lock that its starter holds; when nobody does any more, the element stops soon."""
    job: str | None = None
    """Slurm's number of the job, or of the task of an array."""
    budget: str = ""
    """Which retries count together: those of one job, or of one launcher."""
    port_seed: int = 0
    """Where to begin to look for a free port; 0: at our own pid."""
    grace: float = GRACE_SECONDS
    """How long ranks may take to save after "stop soon"."""
    ends: float | None = None
    """When the time limit of the job is reached, in seconds since the epoch."""
    patience: float = 0.0
    """How long to wait for the element's lock."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else is worth a place in ``attempts.jsonl``: nodes, restarts."""


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

    @property
    def ranks(self) -> int:
        """How many there are, over all nodes."""
        return self.stage.needs.nodes * self.stage.needs.tasks_per_node

    def log(self, rank: int | None) -> Path:
        """The log of a rank, or of what started the ranks; its folder is there."""
        path = self.folder.log(self.number, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def record(self, event: str, **more: Any) -> None:
        """Add a line to ``attempts.jsonl``."""
        append_json_line(self.folder.attempts, {"event": event, "attempt": self.number, "time": time.time(), **more})

    def progress(self) -> float:
        """How far the element would go on from, in its own unit: what is saved, where the stage says so."""
        beat = read_object(self.folder.progress)
        done = beat.get("saved", beat.get("done"))
        return done if isinstance(done, (int, float)) else 0
