"""Hand a plan to Slurm: stage after stage, each array after the jobs it needs; what is done is skipped, what runs is adopted.

An array's folder is written before sbatch is asked and completed when it has
answered. A submitter that is killed in between leaves a token in the job's
comment, by which the next one finds the job instead of making another.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from launcher import queue as queue_module
from launcher import sbatch, slurm
from launcher.cluster import Profile
from launcher.plan import Plan, Stage
from launcher.queue import Queue
from launcher.sbatch import Array
from launcher.slurm import SlurmError
from launcher.state import ACTIVE, DONE, QUEUED, ElementState, read_run
from launcher.submissions import Submission, next_folder, submissions_of, token_of
from recipes.errors import BadInput
from recipes.expand import PLACEHOLDER
from recipes.files import Lock, write_text
from recipes.loader import Loaded, is_secret_variable
from recipes.rundir import RunDir

AMBIGUOUS = ("timed out", "timeout", "Zero Bytes", "Connection", "Unable to contact")
"""sbatch says so when it does not know whether the controller took the job."""
FIND_SECONDS = (0.5, 1.0, 2.0, 4.0)
WELL_KNOWN = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Secrets that libraries of ours look for by themselves."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Draft:
    """An array that is ready to be submitted: its script, and what it waits for."""

    array: Array
    text: str
    after: tuple[str, ...]
    """Jobs that run already."""
    after_drafts: tuple[str, ...]
    """Folders of drafts whose jobs have no number yet."""
    stale: tuple[str, ...] = ()
    """Jobs that wait for something that will not come; this array takes their place."""


def drafts(run: RunDir, plan: Plan, profile: Profile, states: Sequence[ElementState], stages: Sequence[Stage], max_size: int) -> list[Draft]:
    """Every array that has to be submitted, in order. Pure but for the numbers of the folders that are there."""
    found: list[Draft] = []
    submitted = submissions_of(run, plan)
    for stage in stages:
        mine = [state for state in states if state.stage == stage.name]
        new_before = [draft for draft in found if draft.array.stage.name in stage.after]
        stale = [state for state in mine if state.state == QUEUED] if new_before else []
        names = [state.name for state in mine if state.state != DONE and (state.state not in ACTIVE or state in stale)]
        after = tuple(job for before in stage.after for job in _running_jobs(states, submitted[before], before))
        for start in range(0, len(names), max_size):
            jobs = RunDir(run.home(stage.name)).jobs
            folder = next_folder(jobs, stage.name, sum(draft.array.folder.parent == jobs for draft in found))
            array = Array(stage, tuple(names[start : start + max_size]), folder, token_of(folder))
            text = sbatch.script(array, profile, run.root, run.code, plan.run_id)
            leftover = tuple(state.job for state in stale) if start == 0 else ()
            found.append(Draft(array, text, after, tuple(draft.array.folder.name for draft in new_before), leftover))
    return found


def _running_jobs(states: Sequence[ElementState], submissions: Sequence[Submission], stage: str) -> list[str]:
    """What a later stage waits for: whole arrays where all of one is well, else the tasks that still go."""
    active = {state.job for state in states if state.stage == stage and state.state in ACTIVE}
    well = active | {state.job for state in states if state.stage == stage and state.state == DONE}
    found: list[str] = []
    for submission in submissions:
        tasks = [job for job in submission.tasks().values() if job in active]
        if tasks:
            found += [submission.job or ""] if well.issuperset(submission.tasks().values()) else tasks
    return found


def dependency(draft: Draft, jobs: dict[str, str]) -> list[str]:
    """sbatch's option for what a draft waits for; ``jobs`` has the numbers of the drafts before it."""
    ids = [*draft.after, *(jobs[name] for name in draft.after_drafts)]
    return [f"--dependency=afterok:{':'.join(ids)}"] if ids else []


@contextmanager
def submitting(run: RunDir, plan: Plan) -> Iterator[None]:
    """One submitter at a time for a run, and for shards that runs share. Raises BadInput where another one does not end."""
    with ExitStack() as held:
        for folder in ([Path(plan.shared)] if plan.shared else []) + [run.root]:
            lock = Lock(folder / "submit.lock")
            deadline = time.monotonic() + 60
            while not lock.acquire():
                if time.monotonic() > deadline:
                    raise BadInput(f"another amlaunch has been submitting in {folder} for a minute")
                time.sleep(0.2)
            held.callback(lock.release)
        yield


def recover(run: RunDir, plan: Plan, say: Say) -> None:
    """Settle what an earlier submitter began: adopt jobs whose number it never wrote down, forget what never became one.

    Raises SlurmError where Slurm cannot be asked: guessing would lose a job or double it.
    """
    open_ones = [one for submissions in submissions_of(run, plan).values() for one in submissions if one.job is None]
    if not open_ones:
        return
    tokens = _tokens()
    for one in open_ones:
        job = tokens.get(one.token)
        if job:
            dataclasses.replace(one, job=job).write()
            say(f"{one.stage}: job {job} of an interrupted submit found and adopted")
        else:
            shutil.rmtree(one.folder)


def _tokens() -> dict[str, str]:
    """``{token: array}`` of all jobs that Slurm knows."""
    return {info.comment: info.id.split("_")[0] for info in slurm.squeue().values() if info.comment}


def submit_draft(draft: Draft, run: RunDir, cluster: str, jobs: dict[str, str]) -> Submission:
    """Submit one array. Raises BadInput where sbatch refuses it, SlurmError where it cannot be known."""
    array, options = draft.array, dependency(draft, jobs)
    write_text(array.folder / "script.sh", draft.text)
    after = tuple(option.partition("afterok:")[2] for option in options)
    submission = Submission(array.folder, array.stage.name, array.elements, str(run.root), cluster, array.token, time.time(), after)
    submission.write()
    if draft.stale:
        slurm.scancel(draft.stale)
    job: str | None
    try:
        job = sbatch.submit(draft.text, options)
    except SlurmError as error:
        job = _find(array.token) if any(word in error.message for word in AMBIGUOUS) else None
        if job is None:
            shutil.rmtree(array.folder)
            raise BadInput(f"stage {array.stage.name}: sbatch refused it: {error.message}") from None
    submission = dataclasses.replace(submission, job=job)
    submission.write()
    return submission


def _find(token: str) -> str | None:
    """The job with a token, after an sbatch that did not say. Raises SlurmError where squeue does not answer either."""
    problem: SlurmError | None = None
    for seconds in FIND_SECONDS:
        time.sleep(seconds)
        try:
            found = _tokens().get(token)
        except SlurmError as error:
            problem = error
            continue
        if found:
            return found
        problem = None
    if problem:
        raise problem
    return None


def submit_run(run: RunDir, plan: Plan, profile: Profile, cluster: str, stages: Sequence[Stage], say: Say) -> list[Submission]:
    """Submit what is neither done nor on its way; the run's files are there. Raises BadInput and SlurmError."""
    states = read_run(run, plan, Queue(max_age=0))
    made: list[Submission] = []
    jobs: dict[str, str] = {}
    try:
        for draft in drafts(run, plan, profile, states, stages, slurm.max_array_size()):
            submission = submit_draft(draft, run, cluster, jobs)
            jobs[draft.array.folder.name] = submission.job or ""
            made.append(submission)
            say(f"{submission.stage}: {len(submission.elements)} element{'s' * (len(submission.elements) > 1)} as job {submission.job}")
    finally:
        queue_module.forget()
    return made


def write_environment(run: RunDir, loaded: Loaded, profile: Profile) -> list[str]:
    """Write the secrets that jobs need into a file that only the user can read; their names.

    Raises BadInput for one that the profile wants and the shell does not have.
    """
    named = set(PLACEHOLDER.findall(loaded.text())) | set(PLACEHOLDER.findall("\n".join(profile.env.values())))
    wanted = {name for name, _ in named if is_secret_variable(name)} | {name for name in WELL_KNOWN if name in os.environ}
    for name in profile.pass_env:
        if name not in os.environ:
            raise BadInput(f"the profile's pass_env names {name}, which is not set here; export it")
        wanted.add(name)
    values = {name: os.environ[name] for name in sorted(wanted) if name in os.environ}
    write_private(run.environment, values)
    return list(values)


def write_private(path: Path, values: dict[str, str]) -> None:
    """A JSON file that nobody else can read, at no moment of its making."""
    import json

    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    handle = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, path)
