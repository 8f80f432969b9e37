"""Draft the job arrays that a run needs: finished and active elements are skipped, stages wait for their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from amlaunch.launcher.runs.element_state import ElementState
from amlaunch.launcher.runs.states import ACTIVE_STATES, State
from amlaunch.launcher.runs.submissions import Submission, next_folder, submissions_of, token_of
from amlaunch.launcher.slurm import sbatch
from amlaunch.launcher.slurm.sbatch import Array
from amlaunch.launcher.specs.cluster_profile import ClusterProfile
from amlaunch.launcher.specs.plan import Plan, Stage
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.run_layout import RunDir


@dataclass(frozen=True)
class ArrayDraft:
    """An array that is ready to be submitted: its script, and what it waits for."""

    array: Array
    script: str
    after: Dependencies
    after_drafts: tuple[str, ...] = ()
    """Folders of earlier drafts, whose job IDs are not known yet; all of them must succeed."""
    corresponds_to: str = ""
    """Folder of an earlier draft with the same elements: each task waits only for the task of its own element."""
    replaced_jobs: tuple[str, ...] = ()
    """Queued jobs whose inputs will never be complete; this array replaces them."""


@dataclass(frozen=True)
class Dependencies:
    """Active arrays that an array waits for."""

    succeeded: tuple[str, ...] = ()
    """Arrays without a failed task so far; all of them must succeed."""
    ended: tuple[str, ...] = ()
    """Arrays with a failed task, which another array replaces; only their end is waited for.

    Such an array never satisfies ``afterok``, and its tasks may be too many to list one by one.
    """
    checked_stages: tuple[str, ...] = ()
    """Stages that the job itself must check when it starts, since Slurm only waits for their end."""
    corresponding: tuple[str, ...] = ()
    """Array with the same elements: each task waits only for the task of its own element."""


def draft_arrays(
    run: RunDir,
    plan: Plan,
    profile: ClusterProfile,
    states: Sequence[ElementState],
    stages: Sequence[Stage],
    max_size: int,
) -> list[ArrayDraft]:
    """Draft every array that has to be submitted, in order. Reads the run directory, and writes nothing.

    ``max_size``: Slurm's limit for an array. Raises BadInput if an input is being made by ``amlaunch local``.
    """
    drafts: list[ArrayDraft] = []
    submissions = submissions_of(run, plan, strict=True)
    for stage in stages:
        # All ancestors, not only the direct inputs: an input may be done while its own input is being remade.
        inputs = ancestors(plan, stage)
        if stage.elementwise:
            parts = _elementwise_parts(stage, states, drafts, submissions[stage.after[0]])
        else:
            awaited = {name: submissions[name] for name in inputs}
            input_drafts = [draft for draft in drafts if draft.array.stage.name in inputs]
            parts = _whole_parts(plan, stage, states, input_drafts, awaited)

        if parts:
            _check_inputs_on_cluster(states, inputs)
        jobs = RunDir(run.stage_home(stage.name)).jobs
        for part in parts:
            for start in range(0, len(part.elements), max_size):
                drafted = sum(draft.array.folder.parent == jobs for draft in drafts)
                folder = next_folder(jobs, stage.name, drafted)
                array = Array(stage, part.elements[start : start + max_size], folder, token_of(folder))
                script = sbatch.script(array, profile, run.root, run.code, plan.run_id)
                replaced_jobs = part.replaced_jobs if start == 0 else ()
                drafts.append(
                    ArrayDraft(array, script, part.after, part.after_drafts, part.corresponds_to, replaced_jobs)
                )
    return drafts


@dataclass(frozen=True)
class _Part:
    """Elements of a stage that wait for the same; see :class:`ArrayDraft`."""

    elements: tuple[str, ...]
    after: Dependencies
    after_drafts: tuple[str, ...] = ()
    corresponds_to: str = ""
    replaced_jobs: tuple[str, ...] = ()


def _whole_parts(
    plan: Plan,
    stage: Stage,
    states: Sequence[ElementState],
    input_drafts: Sequence[ArrayDraft],
    submissions: dict[str, list[Submission]],
) -> list[_Part]:
    """Return the elements to submit of a stage that waits for all of its inputs."""
    names, replaced_jobs = _pending_elements(stage, states, inputs_change=bool(input_drafts))
    if not names:
        return []
    remade = {draft.array.stage.name for draft in input_drafts}
    after_drafts = tuple(draft.array.folder.name for draft in input_drafts)
    return [_Part(names, _dependencies(plan, states, submissions, remade), after_drafts, replaced_jobs=replaced_jobs)]


def _elementwise_parts(
    stage: Stage, states: Sequence[ElementState], drafts: Sequence[ArrayDraft], submissions: Sequence[Submission]
) -> list[_Part]:
    """Return the elements to submit of a stage whose elements wait only for those of the same name before them.

    A part has the elements that wait for one array. If it has exactly the array's elements, Slurm pairs their tasks
    (``aftercorr``); otherwise Slurm waits for the array's end, and each job checks its own input.
    """
    (source,) = stage.after
    own_states = [state for state in states if state.stage == stage.name]
    inputs = {state.name: state for state in states if state.stage == source}
    parts: list[_Part] = []
    drafted: set[str] = set()
    for draft in drafts:
        if draft.array.stage.name == source:
            names = draft.array.elements
            queued = [state for state in own_states if state.name in names and state.state == State.QUEUED]
            replaced_jobs = tuple(state.job for state in queued if state.job)
            parts.append(_Part(names, Dependencies(), (), draft.array.folder.name, replaced_jobs))
            drafted.update(names)

    ready: list[str] = []
    by_job: dict[str, list[str]] = {}
    for state in own_states:
        if state.name in drafted or state.state == State.DONE or state.state in ACTIVE_STATES:
            continue
        own_input = inputs[state.name]
        if own_input.state == State.DONE:
            ready.append(state.name)
        elif own_input.state in ACTIVE_STATES:
            by_job.setdefault(own_input.job.partition("_")[0], []).append(state.name)
    if ready:
        parts.append(_Part(tuple(ready), Dependencies()))
    elements_of_job = {submission.job: submission.elements for submission in submissions}
    for job, waiting in by_job.items():
        after = Dependencies(ended=(job,), checked_stages=(source,))
        if tuple(waiting) == elements_of_job.get(job):
            after = Dependencies(corresponding=(job,))
        parts.append(_Part(tuple(waiting), after))
    return parts


def _pending_elements(
    stage: Stage, states: Sequence[ElementState], *, inputs_change: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return ``(elements to submit, queued jobs that they replace)``.

    If an input is submitted again, the queued jobs of the stage wait for an array that has failed.
    """
    stage_states = [state for state in states if state.stage == stage.name]
    replaced = [state for state in stage_states if state.state == State.QUEUED and state.job] if inputs_change else []
    kept = {state.name for state in stage_states if state.state in ACTIVE_STATES} - {state.name for state in replaced}
    names = tuple(state.name for state in stage_states if state.state != State.DONE and state.name not in kept)
    return names, tuple(state.job for state in replaced)


def ancestors(plan: Plan, stage: Stage) -> list[str]:
    """Return the names of all stages that must be done before ``stage``, the nearest last."""
    names: list[str] = []
    for name in stage.after:
        names += [*ancestors(plan, plan.stage(name)), name]
    return list(dict.fromkeys(names))


def _check_inputs_on_cluster(states: Sequence[ElementState], inputs: Sequence[str]) -> None:
    """Raise BadInput if ``amlaunch local`` is making an input: a job cannot wait for a local process."""
    for state in states:
        if state.stage in inputs and state.state == State.RUNNING and not state.job:
            raise BadInput(
                f"{state.stage} {state.name} is running in amlaunch local on {state.host} (runs with the same text "
                "share their shards); submit again once it is done"
            )


def _dependencies(
    plan: Plan, states: Sequence[ElementState], submissions: dict[str, list[Submission]], remade: set[str]
) -> Dependencies:
    """Return the active arrays of the input stages; ``remade`` are the input stages that are submitted again."""
    healthy: dict[str, list[str]] = {}
    failing: dict[str, list[str]] = {}
    for name, arrays in submissions.items():
        healthy[name], failing[name] = _active_arrays([state for state in states if state.stage == name], arrays)

    # A stage that this array waits for has itself checked its inputs.
    awaited = remade | {name for name in submissions if healthy[name] or failing[name]}
    checked_by_others = {ancestor for name in awaited for ancestor in ancestors(plan, plan.stage(name))}
    return Dependencies(
        tuple(job for jobs in healthy.values() for job in jobs),
        tuple(job for jobs in failing.values() for job in jobs),
        tuple(name for name, jobs in failing.items() if jobs and name not in checked_by_others),
    )


def _active_arrays(states: Sequence[ElementState], submissions: Sequence[Submission]) -> tuple[list[str], list[str]]:
    """Return the job IDs of a stage's active arrays: those without a failed task so far, and the others."""
    active = {state.job for state in states if state.state in ACTIVE_STATES}
    active_or_done = active | {state.job for state in states if state.state == State.DONE}
    healthy: list[str] = []
    failing: list[str] = []
    for submission in submissions:
        tasks = submission.tasks().values()
        if not active.isdisjoint(tasks):
            (healthy if active_or_done.issuperset(tasks) else failing).append(submission.job or "")
    return healthy, failing


def dependency_clauses(draft: ArrayDraft, jobs: dict[str, str]) -> list[str]:
    """Return Slurm's dependency clauses, all of which must hold; ``jobs``: ``{folder: job ID}`` of earlier drafts."""
    corresponding = [*draft.after.corresponding, *([jobs[draft.corresponds_to]] if draft.corresponds_to else [])]
    clauses = {
        "afterok": [*draft.after.succeeded, *(jobs[folder] for folder in draft.after_drafts)],
        "aftercorr": corresponding,
        "afterany": list(draft.after.ended),
    }
    return [f"{kind}:{':'.join(ids)}" for kind, ids in clauses.items() if ids]


def dependency_options(draft: ArrayDraft, jobs: dict[str, str]) -> list[str]:
    """Return sbatch's options for :func:`dependency_clauses`."""
    clauses = dependency_clauses(draft, jobs)
    return [f"--dependency={','.join(clauses)}"] if clauses else []
