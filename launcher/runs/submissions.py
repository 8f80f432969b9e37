"""The record of submissions: one folder for each array, written before sbatch is called and completed by its answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import fingerprint, read_object, write_json
from amlaunch.recipes.run_layout import RunDir


@dataclass(frozen=True)
class Submission:
    """One submitted array of a stage."""

    folder: Path
    stage: str
    elements: tuple[str, ...]
    """By their index in the array."""
    run: str
    """The run directory that submitted it; runs that share its shards see it, too."""
    cluster: str
    """The name of the cluster profile."""
    token: str
    time: float
    after: tuple[str, ...] = ()
    """Clauses of sbatch's ``--dependency``: ``afterok:11:12``, ``afterany:7``."""
    job: str | None = None
    """Slurm job ID of the array; None: sbatch has not answered."""
    abandoned: bool = False
    """Slurm did not know the job when a later submit looked for it. If it appears after all, it exits at once."""
    needs: dict[str, Any] = field(default_factory=dict)
    """The resources of its jobs: the run's plan may have changed by the time they start."""
    profile: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    container: dict[str, Any] | None = None
    inputs: tuple[str, ...] = ()
    """Stages for whose end alone Slurm waits (``afterany``): the job itself checks that they are done."""
    slurm: str = ""
    """The ClusterName of the Slurm that has the job; on another cluster its ID is another job."""

    def task(self, index: int) -> str:
        """Return the Slurm job ID of one element."""
        return f"{self.job}_{index}"

    def tasks(self) -> dict[str, str]:
        """Return the Slurm job IDs by element."""
        return {element: self.task(index) for index, element in enumerate(self.elements)}

    @property
    def file(self) -> Path:
        """The file of this record."""
        return self.folder / "submission.json"

    def write(self) -> None:
        """Write the record, atomically."""
        value = dataclasses.asdict(self)
        del value["folder"]
        write_json(self.file, value)

    def log(self, index: int) -> Path:
        """Return the output of the job itself: what happened before, around and after the driver."""
        return self.folder / f"{self.job}_{index}.log"


def read_submission(folder: Path) -> Submission:
    """Read the submission in ``folder``. Raises ValueError if it is damaged or missing."""
    value = read_object(folder / "submission.json")
    try:
        tuples = {name: tuple(value.get(name, ())) for name in ("elements", "after", "inputs")}
        return Submission(folder, **{**value, **tuples})
    except (KeyError, TypeError):
        raise ValueError(f"{folder}: the submission is damaged, or from another version of amlaunch") from None


def read_submissions(jobs: Path, *, strict: bool = False) -> list[Submission]:
    """Read all submissions below a ``jobs`` folder, the oldest first, without abandoned ones.

    Damaged ones are left out; with ``strict`` they raise BadInput, because their work would be submitted again.
    """
    submissions = []
    # Sorted by number, not by time: clocks of different hosts differ.
    for path in sorted(jobs.glob("[0-9]*-*/submission.json"), key=lambda path: _number(path.parent)):
        try:
            submissions.append(read_submission(path.parent))
        except ValueError as error:
            if strict:
                raise BadInput(f"{error}; once its jobs have ended, delete {path.parent}") from None
    return [submission for submission in submissions if not submission.abandoned]


def _number(folder: Path) -> int:
    number = folder.name.split("-")[0]
    return int(number) if number.isdigit() else 0


def submissions_of(run: RunDir, plan: Plan, *, strict: bool = False) -> dict[str, list[Submission]]:
    """Return the submissions of each stage, the oldest first, including those of shared stages."""
    by_stage: dict[str, list[Submission]] = {stage.name: [] for stage in plan.stages}
    for home in dict.fromkeys(run.stage_home(stage.name) for stage in plan.stages):
        for submission in read_submissions(RunDir(home).jobs, strict=strict):
            if submission.stage in by_stage and run.stage_home(submission.stage) == home:
                by_stage[submission.stage].append(submission)
    return by_stage


def newest_jobs(submissions: Iterable[Submission]) -> dict[str, tuple[Submission, int]]:
    """Return each element's newest submission and its index there; ``submissions``: the oldest first."""
    return {
        element: (submission, index) for submission in submissions for index, element in enumerate(submission.elements)
    }


def next_folder(jobs: Path, stage: str, reserved: int = 0) -> Path:
    """Return the folder of the next submission below ``jobs``, after ``reserved`` folders that are still to be made."""
    newest = max(map(_number, jobs.glob("[0-9]*-*")), default=0)
    return jobs / f"{newest + 1 + reserved:03}-{stage}"


def token_of(folder: Path) -> str:
    """Return the job comment that identifies this submission among all jobs of the user."""
    return f"amlaunch:{folder.name}:{fingerprint(str(folder.absolute()))}"
