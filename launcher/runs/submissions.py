"""What was submitted: one folder for each array, written before sbatch is asked and completed when it has answered."""

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
    """One array: which elements of which stage, for which run, and the job's number."""

    folder: Path
    stage: str
    elements: tuple[str, ...]
    """By their index in the array."""
    run: str
    """The run directory that it was submitted for; runs that share its shards see it, too."""
    cluster: str
    token: str
    time: float
    after: tuple[str, ...] = ()
    """What Slurm was told to wait for: ``afterok:11:12``, ``afterany:7``."""
    job: str | None = None
    """Slurm's number of the array; None: sbatch has not answered (yet)."""
    abandoned: bool = False
    """Slurm did not know of it when somebody looked: a job that comes up late finds another one in its place, and leaves."""
    needs: dict[str, Any] = field(default_factory=dict)
    """What its jobs were given: the run's plan may be another one by the time that they start."""
    profile: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    container: dict[str, Any] | None = None
    """In what its jobs run; None: without a container."""
    inputs: tuple[str, ...] = ()
    """Stages of which Slurm only waits for the end (``afterany``): the job looks itself whether they are done."""
    slurm: str = ""
    """The ClusterName of the Slurm that has it; on another cluster its number is somebody else's."""

    def task(self, index: int) -> str:
        """Slurm's name of one element's job."""
        return f"{self.job}_{index}"

    def tasks(self) -> dict[str, str]:
        """``{element: job}``."""
        return {element: self.task(index) for index, element in enumerate(self.elements)}

    @property
    def file(self) -> Path:
        """Where it is written."""
        return self.folder / "submission.json"

    def write(self) -> None:
        """Make it durable."""
        value = dataclasses.asdict(self)
        del value["folder"]
        write_json(self.file, value)

    def log(self, index: int) -> Path:
        """What the job itself wrote: what happened before, around and after the driver."""
        return self.folder / f"{self.job}_{index}.log"


def read_submission(folder: Path) -> Submission:
    """The submission in ``folder``. Raises ValueError where it is damaged or missing."""
    value = read_object(folder / "submission.json")
    try:
        listed = {name: tuple(value.get(name, ())) for name in ("elements", "after", "inputs")}
        return Submission(folder, **{**value, **listed})
    except (KeyError, TypeError):
        raise ValueError(
            f"{folder}: not a submission that this amlaunch can read (damaged, or of another version)"
        ) from None


def read_submissions(jobs: Path, *, strict: bool = False) -> list[Submission]:
    """All submissions below a ``jobs`` folder, oldest first, without abandoned ones.

    Damaged ones are left out; with ``strict`` they are a BadInput, for whoever would submit their work again.
    """
    found = []
    for path in sorted(
        jobs.glob("[0-9]*-*/submission.json"), key=lambda path: _number(path.parent)
    ):  # not by clocks, which differ
        try:
            found.append(read_submission(path.parent))
        except ValueError as error:
            if strict:
                raise BadInput(f"{error}; if its jobs are over, remove {path.parent}") from None
    return [submission for submission in found if not submission.abandoned]


def _number(folder: Path) -> int:
    number = folder.name.split("-")[0]
    return int(number) if number.isdigit() else 0


def submissions_of(run: RunDir, plan: Plan, *, strict: bool = False) -> dict[str, list[Submission]]:
    """``{stage: its submissions, oldest first}``, wherever the stage keeps them."""
    found: dict[str, list[Submission]] = {stage.name: [] for stage in plan.stages}
    for home in dict.fromkeys(run.stage_home(stage.name) for stage in plan.stages):
        for submission in read_submissions(RunDir(home).jobs, strict=strict):
            if submission.stage in found and run.stage_home(submission.stage) == home:
                found[submission.stage].append(submission)
    return found


def newest_jobs(submissions: Iterable[Submission]) -> dict[str, tuple[Submission, int]]:
    """``{element: (its newest submission, its index there)}``; later ones replace earlier ones."""
    return {
        element: (submission, index) for submission in submissions for index, element in enumerate(submission.elements)
    }


def next_folder(jobs: Path, stage: str, taken: int = 0) -> Path:
    """The folder of the next submission below ``jobs``; ``taken``: so many more are already promised."""
    return jobs / f"{max(map(_number, jobs.glob('[0-9]*-*')), default=0) + 1 + taken:03}-{stage}"


def token_of(folder: Path) -> str:
    """What finds the job of this submission among all jobs of the user."""
    return f"amlaunch:{folder.name}:{fingerprint(str(folder.absolute()))}"
