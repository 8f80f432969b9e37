"""What was submitted: one folder for each array, written before sbatch is asked and completed when it has answered."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launcher.plan import Plan
from recipes.files import fingerprint, read_object, write_json
from recipes.rundir import RunDir


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
    """The jobs that must end well before it starts."""
    job: str | None = None
    """Slurm's number of the array; None: sbatch has not answered (yet)."""

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
        return Submission(folder, **{**value, "elements": tuple(value["elements"]), "after": tuple(value["after"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: not a submission that this amlaunch can read ({error!r})") from None


def read_submissions(jobs: Path) -> list[Submission]:
    """All submissions below a ``jobs`` folder, oldest first; damaged ones are left out."""
    found = []
    for path in sorted(jobs.glob("[0-9]*-*/submission.json")):
        try:
            found.append(read_submission(path.parent))
        except ValueError:
            continue
    return sorted(found, key=lambda submission: (submission.time, submission.folder.name))


def submissions_of(run: RunDir, plan: Plan) -> dict[str, list[Submission]]:
    """``{stage: its submissions, oldest first}``, wherever the stage keeps them."""
    found: dict[str, list[Submission]] = {stage.name: [] for stage in plan.stages}
    for home in dict.fromkeys(run.home(stage.name) for stage in plan.stages):
        for submission in read_submissions(RunDir(home).jobs):
            if submission.stage in found and run.home(submission.stage) == home:
                found[submission.stage].append(submission)
    return found


def newest_jobs(submissions: Iterable[Submission]) -> dict[str, tuple[Submission, int]]:
    """``{element: (its newest submission, its index there)}``; later ones replace earlier ones."""
    return {element: (submission, index) for submission in submissions for index, element in enumerate(submission.elements)}


def next_folder(jobs: Path, stage: str, taken: int = 0) -> Path:
    """The folder of the next submission below ``jobs``; ``taken``: so many more are already promised."""
    numbers = [int(path.name.split("-")[0]) for path in jobs.glob("[0-9]*-*") if path.name.split("-")[0].isdigit()]
    return jobs / f"{max(numbers, default=0) + 1 + taken:03}-{stage}"


def token_of(folder: Path) -> str:
    """What finds the job of this submission among all jobs of the user."""
    return f"amlaunch:{folder.name}:{fingerprint(str(folder.absolute()))}"
