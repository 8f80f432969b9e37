"""One attempt to run one element: its resources on this host, and its files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from amlaunch.launcher.runs.attempt_record import AttemptEnd, AttemptHistory, AttemptStart, append_attempt
from amlaunch.launcher.specs.plan import Element, Plan, Stage
from amlaunch.recipes.files import Lock, read_object
from amlaunch.recipes.run_layout import ElementDir, RunDir

GRACE_SECONDS = 120.0


@dataclass(frozen=True)
class Assignment:
    """The resources and limits of one attempt on this host."""

    cpus: int
    gpus: tuple[str, ...]
    """Values for ``CUDA_VISIBLE_DEVICES``."""
    launcher_lock: str | None = None
    """A lock that the launcher holds. Once nobody holds it, the element saves and stops."""
    job: str | None = None
    """Slurm job ID, of one task of an array."""
    budget: str = ""
    """Attempts with the same budget (one job, or one launcher) count together towards the retry limit."""
    port_seed: int = 0
    """The search for a free port starts here; 0: at this process's ID."""
    grace_seconds: float = GRACE_SECONDS
    """Time for ranks to save after they are asked to stop."""
    job_end: float | None = None
    """The job's time limit in Unix seconds."""
    lock_seconds: float = 0.0
    """Time to wait for the element's lock."""
    total_gpus: int = 0
    """Number of GPUs on all nodes."""
    nodes: str = ""
    """Slurm node list."""
    restarts: int | None = None
    """Number of times Slurm has requeued the job."""


@dataclass(frozen=True)
class Attempt:
    """One attempt to run one element."""

    run: RunDir
    plan: Plan
    stage: Stage
    element: Element
    assignment: Assignment
    lock: Lock
    number: int

    @property
    def folder(self) -> ElementDir:
        """The folder of the element."""
        return self.run.element(self.stage.name, self.element.name)

    @property
    def ranks(self) -> int:
        """The number of ranks on all nodes."""
        return self.stage.needs.nodes * self.stage.needs.tasks_per_node

    def log(self, rank: int | None) -> Path:
        """Return the log of a rank, or of the driver if ``rank`` is None; its folder exists afterwards."""
        path = self.folder.log(self.number, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def record(self, line: AttemptStart | AttemptEnd) -> None:
        """Add a line to ``attempts.jsonl``."""
        append_attempt(self.folder.attempts, line)

    @property
    def history(self) -> AttemptHistory:
        """The attempts of the element so far, this one included."""
        return AttemptHistory.read(self.folder.attempts)

    @property
    def saved_progress(self) -> float:
        """The progress from which the element would continue, in the stage's own unit."""
        heartbeat = read_object(self.folder.progress)
        saved = heartbeat.get("saved", heartbeat.get("done"))
        return saved if isinstance(saved, (int, float)) else 0
