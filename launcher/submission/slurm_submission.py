"""Hand a plan to Slurm: stage after stage, each array after the jobs it needs; what is done is skipped, what runs is adopted.

An array's folder is written before sbatch is asked and completed when it has
answered. A submitter that is killed in between leaves a token in the job's
comment, by which the next one finds the job instead of making another.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from amlaunch.launcher.display import wording
from amlaunch.launcher.errors import SlurmError
from amlaunch.launcher.runs.element_state import ElementState, read_run
from amlaunch.launcher.runs.states import ACTIVE_STATES, State
from amlaunch.launcher.runs.submissions import Submission, next_folder, submissions_of, token_of
from amlaunch.launcher.slurm import client, sbatch
from amlaunch.launcher.slurm import queue as queue_module
from amlaunch.launcher.slurm.queue import Queue
from amlaunch.launcher.slurm.sbatch import Array
from amlaunch.launcher.specs.cluster_profile import ClusterProfile
from amlaunch.launcher.specs.plan import Plan, Stage
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import Lock, read_object, write_private, write_text
from amlaunch.recipes.format.loader import LoadedRecipe, is_secret_variable
from amlaunch.recipes.format.placeholders import PLACEHOLDER
from amlaunch.recipes.run_layout import RunDir

REFUSED = "Batch job submission failed"
AMBIGUOUS = (
    "not found: is this",
    "no answer in",
    "timed out",
    "timeout",
    "Zero Bytes",
    "connect",
    "contact",
    "unexpected message",
    "try again",
)
"""With one of these, sbatch does not know whether the controller took the job."""
CLOCK_SECONDS = 120.0
"""By how much the clocks of this host and of the controller may differ."""
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
    """Arrays on their way, which all must end well."""
    after_drafts: tuple[str, ...]
    """Folders of drafts whose jobs have no number yet."""
    after_end: tuple[str, ...] = ()
    """Arrays on their way of which something has failed already, and is made by another array."""
    inputs: tuple[str, ...] = ()
    """The stages of these: what Slurm cannot promise, the job looks for itself."""
    stale: tuple[str, ...] = ()
    """Jobs that wait for something that will not come; this array takes their place."""


def drafts(
    run: RunDir,
    plan: Plan,
    profile: ClusterProfile,
    states: Sequence[ElementState],
    stages: Sequence[Stage],
    max_size: int,
) -> list[Draft]:
    """Every array that has to be submitted, in order. Pure but for the numbers of the folders that are there."""
    found: list[Draft] = []
    submitted = submissions_of(run, plan, strict=True)
    for stage in stages:
        before = ancestors(plan, stage)  # not only its own: one may be done while what it was made of is made again
        mine = [state for state in states if state.stage == stage.name]
        new_before = [draft for draft in found if draft.array.stage.name in before]
        stale = [state for state in mine if state.state == State.QUEUED and state.job] if new_before else []
        going = {state.name for state in mine if state.state in ACTIVE_STATES} - {state.name for state in stale}
        names = [state.name for state in mine if state.state != State.DONE and state.name not in going]
        if names:
            _refuse_local(states, before)
        waits = {name: _running_arrays(states, submitted[name], name) for name in before}
        well, ill = (tuple(job for found in waits.values() for job in found[i]) for i in (0, 1))
        waited = {draft.array.stage.name for draft in new_before} | {
            name for name, found in waits.items() if any(found)
        }
        looked_at = {
            name for later in waited for name in ancestors(plan, plan.stage(later))
        }  # by a stage that we wait for, too
        inputs = tuple(name for name, found in waits.items() if found[1] and name not in looked_at)
        for start in range(0, len(names), max_size):
            jobs = RunDir(run.stage_home(stage.name)).jobs
            folder = next_folder(jobs, stage.name, sum(draft.array.folder.parent == jobs for draft in found))
            array = Array(stage, tuple(names[start : start + max_size]), folder, token_of(folder))
            text = sbatch.script(array, profile, run.root, run.code, plan.run_id)
            leftover = tuple(state.job for state in stale) if start == 0 else ()
            found.append(
                Draft(array, text, well, tuple(draft.array.folder.name for draft in new_before), ill, inputs, leftover)
            )
    return found


def ancestors(plan: Plan, stage: Stage) -> list[str]:
    """The names of all stages that must be done before ``stage``, nearest last."""
    found: list[str] = []
    for name in stage.after:
        found += [*ancestors(plan, plan.stage(name)), name]
    return list(dict.fromkeys(found))


def _refuse_local(states: Sequence[ElementState], stages: Sequence[str]) -> None:
    """A job cannot be told to wait for a process of another machine. Raises BadInput."""
    for state in states:
        if state.stage in stages and state.state == State.RUNNING and not state.job:
            raise BadInput(
                f"{state.stage} {state.name} is being made by amlaunch local on {state.host}, for all runs with that text; submit again when it is done"
            )


def _running_arrays(
    states: Sequence[ElementState], submissions: Sequence[Submission], stage: str
) -> tuple[list[str], list[str]]:
    """What a later stage waits for: arrays on their way of which all is well, and those of which something is not.

    An array with a failed task never satisfies ``afterok``, and its tasks one by one may be thousands: of such a one
    the end is waited for.
    """
    active = {state.job for state in states if state.stage == stage and state.state in ACTIVE_STATES}
    fine = active | {state.job for state in states if state.stage == stage and state.state == State.DONE}
    well: list[str] = []
    ill: list[str] = []
    for submission in submissions:
        tasks = submission.tasks().values()
        if not active.isdisjoint(tasks):
            (well if fine.issuperset(tasks) else ill).append(submission.job or "")
    return well, ill


def dependency(draft: Draft, jobs: dict[str, str]) -> list[str]:
    """sbatch's option for what a draft waits for; ``jobs`` has the numbers of the drafts before it."""
    clauses = waits_for(draft, jobs)
    return [f"--dependency={','.join(clauses)}"] if clauses else []


def waits_for(draft: Draft, jobs: dict[str, str]) -> list[str]:
    """The parts of :func:`dependency`, all of which must hold."""
    waits = {"afterok": [*draft.after, *(jobs[name] for name in draft.after_drafts)], "afterany": draft.after_end}
    return [f"{kind}:{':'.join(ids)}" for kind, ids in waits.items() if ids]


def moved_note(run: RunDir, plan: Plan, cluster: str, states: Sequence[ElementState]) -> str:
    """What to say where a run was submitted to another cluster before; empty where it was not. Raises BadInput while jobs of it are there."""
    mine = [
        one for submissions in submissions_of(run, plan).values() for one in submissions if one.run == str(run.root)
    ]
    newest = max(mine, key=lambda one: one.time).cluster if mine else cluster
    jobs = {job: one for one in mine if one.cluster != cluster for job in one.tasks().values()}
    going = [state for state in states if state.state in ACTIVE_STATES and state.job in jobs]
    if going:
        first, name = jobs[going[0].job], wording.name_of(run)
        raise BadInput(
            f"{plan.run_id} is on its way on cluster {first.cluster} ({going[0].stage} {going[0].name}: job {going[0].job}); "
            f"go on with --cluster {first.cluster}, or end it first: {wording.program()} cancel {name} --checkpoint"
        )
    return (
        f"{plan.run_id} was on cluster {newest} before; what is done stays, the rest goes to {cluster}"
        if newest != cluster
        else ""
    )


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
    open_ones = [
        one for submissions in submissions_of(run, plan, strict=True).values() for one in submissions if one.job is None
    ]
    if not open_ones:
        return
    here = client.cluster_name()
    abroad = next((one for one in open_ones if one.slurm not in ("", here)), None)
    if abroad:
        raise SlurmError(
            "Slurm",
            f"a submit to cluster {abroad.slurm} was interrupted, and this is {here}: the same command there settles it",
        )
    tokens = _tokens(min(one.time for one in open_ones))
    for one in open_ones:
        job = tokens.get(one.token)
        if job:
            dataclasses.replace(one, job=job).write()
            say(f"{one.stage}: job {job} of an interrupted submit found and adopted")
        else:
            dataclasses.replace(one, abandoned=True).write()  # its sbatch may still be on its way


def _tokens(since: float) -> dict[str, str]:
    """``{token: array}`` of all jobs that Slurm knows and that are not older than ``since`` (another run may have been there before)."""
    jobs = client.squeue().values()
    return {
        info.comment: info.id.split("_")[0]
        for info in jobs
        if info.comment and info.submitted_at > since - CLOCK_SECONDS
    }


def submit_draft(draft: Draft, run: RunDir, plan: Plan, jobs: dict[str, str]) -> Submission:
    """Submit one array. Raises BadInput where sbatch refuses it, SlurmError where it cannot be known."""
    array, options = draft.array, dependency(draft, jobs)
    write_text(array.folder / "script.sh", draft.text)
    cluster = plan.cluster or {}
    submission = Submission(
        folder=array.folder,
        stage=array.stage.name,
        elements=array.elements,
        run=str(run.root),
        cluster=str(cluster.get("name")),
        token=array.token,
        time=time.time(),
        after=tuple(waits_for(draft, jobs)),
        inputs=draft.inputs,
        slurm=client.cluster_name(),
        needs=dataclasses.asdict(array.stage.needs),
        profile=dict(cluster.get("profile") or {}),
        env=plan.env,
        container=dataclasses.asdict(array.stage.container) if array.stage.container else None,
    )
    submission.write()
    if draft.stale:
        client.scancel(draft.stale)
    try:
        job = sbatch.submit(draft.text, options)
    except SlurmError as error:
        job = _settle(submission, error)
    submission = dataclasses.replace(submission, job=job)
    submission.write()
    return submission


def has_refused(error: SlurmError) -> bool:
    """Whether it is the controller that spoke, and not somebody who could not reach it."""
    return not any(word.lower() in error.message.lower() for word in AMBIGUOUS)


def _settle(submission: Submission, error: SlurmError) -> str:
    """The job of an sbatch that ended with an error: it may be in the queue all the same.

    Raises BadInput where sbatch refused it, SlurmError where nobody knows; the
    open submission then stays, for :func:`recover`.
    """
    refused = REFUSED in error.message and has_refused(error)
    for seconds in (0.0,) if refused else FIND_SECONDS:
        time.sleep(seconds)
        try:
            job = _tokens(submission.time).get(submission.token)
        except SlurmError:
            continue
        if job:
            return job
    if refused:
        dataclasses.replace(submission, abandoned=True).write()
        raise BadInput(f"stage {submission.stage}: sbatch refused it: {error.message}") from None
    raise SlurmError(
        "sbatch", f"{error.message}; whether it took stage {submission.stage} is not known: the same command finds out"
    ) from None


def known_states(run: RunDir, plan: Plan) -> list[ElementState]:
    """The states of all elements, as Slurm has them now. Raises SlurmError where it cannot say: guessing would double a job."""
    queue = Queue(max_age=0)
    states = read_run(run, plan, queue)
    lost = [state for state in states if state.state == State.UNKNOWN and state.job]  # without a number: see recover
    if lost:
        why = f"{'; '.join(queue.problems)}; try again when Slurm answers" if queue.problems else lost[0].reason
        raise SlurmError("Slurm", f"what became of job {lost[0].job} is not known: {why}")
    return states


def submit_run(run: RunDir, plan: Plan, profile: ClusterProfile, stages: Sequence[Stage], say: Say) -> list[Submission]:
    """Submit what is neither done nor on its way; the run's files are there. Raises BadInput and SlurmError."""
    states = known_states(run, plan)
    made: list[Submission] = []
    jobs: dict[str, str] = {}
    try:
        found = drafts(run, plan, profile, states, stages, client.max_array_size())
        for stage in stages:  # told in the plan's order, what is left alone too
            mine = [draft for draft in found if draft.array.stage is stage]
            for words in left_alone(stage, states, {name for draft in mine for name in draft.array.elements}):
                say(words)
            for draft in mine:
                submission = submit_draft(draft, run, plan, jobs)
                jobs[draft.array.folder.name] = submission.job or ""
                made.append(submission)
                say(
                    f"{stage.name}: {len(submission.elements)} element{'s' * (len(submission.elements) > 1)} as job {submission.job}"
                )
    finally:
        queue_module.forget()
    return made


def left_alone(stage: Stage, states: Sequence[ElementState], submitted: Container[str]) -> list[str]:
    """What is said of the elements of a stage that are not submitted: done, or on their way."""
    mine = [state for state in states if state.stage == stage.name and state.name not in submitted]
    done, going = sum(state.state == State.DONE for state in mine), sum(state.state in ACTIVE_STATES for state in mine)
    lines = [f"{stage.name}: {done} of {len(stage.elements)} already done, skipped"] if done else []
    return lines + (
        [f"{stage.name}: {going} of {len(stage.elements)} already on their way, left alone"] if going else []
    )


def write_environment(run: RunDir, loaded: LoadedRecipe, profile: ClusterProfile) -> list[str]:
    """Write the secrets that jobs need into a file that only the user can read; their names.

    Raises BadInput for one that the profile wants and the shell does not have.
    """
    named = set(PLACEHOLDER.findall(loaded.text())) | set(PLACEHOLDER.findall("\n".join(profile.env.values())))
    wanted = {name for name, _ in named if is_secret_variable(name)} | {
        name for name in WELL_KNOWN if name in os.environ
    }
    for name in profile.pass_env:
        if name not in os.environ:
            raise BadInput(f"the profile's pass_env names {name}, which is not set here; export it")
        wanted.add(name)
    values = {name: os.environ[name] for name in sorted(wanted) if name in os.environ}
    write_private(
        run.environment, {**read_object(run.environment), **values}
    )  # jobs of another submit may wait for theirs
    return list(values)
