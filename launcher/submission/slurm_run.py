"""Submit a run to Slurm, or print exactly what would be submitted."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from amlaunch.launcher.display import wording
from amlaunch.launcher.display.following import wait_until_ended
from amlaunch.launcher.errors import SlurmError
from amlaunch.launcher.execution import srun_step
from amlaunch.launcher.planning.run_request import RunRequest
from amlaunch.launcher.planning.run_sources import RESUMED_STAGES, ResolvedRun, StartKind
from amlaunch.launcher.runs.element_state import ElementState, overall_state, read_run
from amlaunch.launcher.runs.find import read_plan
from amlaunch.launcher.runs.states import ACTIVE_STATES, State
from amlaunch.launcher.runs.submissions import Submission
from amlaunch.launcher.slurm import client, sbatch
from amlaunch.launcher.specs.cluster_profile import Cluster
from amlaunch.launcher.specs.plan import Plan
from amlaunch.launcher.submission.array_drafts import ArrayDraft, dependency_options, draft_arrays
from amlaunch.launcher.submission.preflight import Say, check_inputs, check_not_driven
from amlaunch.launcher.submission.run_writer import write_environment, write_start
from amlaunch.launcher.submission.slurm_submission import (
    check_moved,
    is_refusal,
    known_states,
    recover,
    submit_run,
    submitting,
)
from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.run_layout import RunDir


def submit_to_slurm(run: ResolvedRun, cluster: Cluster, request: RunRequest, notes: Sequence[str], say: Say) -> int:
    """Submit what is not done, or with ``--dry-run`` print it; return the exit code. Raises BadInput and SlurmError."""
    check_not_driven(run.run_dir)
    states = _expected_states(run, known_states(run.run_dir, run.plan))
    moved = check_moved(run.run_dir, run.plan, cluster.name, states)
    check_inputs(run, states, [State.DONE, *ACTIVE_STATES])
    pending = draft_arrays(run.run_dir, run.plan, cluster.profile, states, run.stages, client.max_array_size())
    notes = [*filter(None, [moved]), *_check_with_sbatch(pending), *notes]
    for line in wording.note_lines(notes, verbose=request.verbose):
        say(line)

    if request.dry_run:
        _print_drafts(run, cluster, pending, notes, json=request.json)
        return OK
    submissions = _submit(run, cluster, request.argv, say)
    return finish(run.run_dir, run.plan, submissions, request, say, notes)


def _expected_states(run: ResolvedRun, states: Sequence[ElementState]) -> list[ElementState]:
    """Return the states as they will be once the done markers of restarted stages are set aside."""
    _check_not_training(run, states)
    return [
        replace(state, state=State.PENDING)
        if state.stage in run.restarted_stages and state.state == State.DONE
        else state
        for state in states
    ]


def _check_not_training(run: ResolvedRun, states: Sequence[ElementState]) -> None:
    """Raise BadInput if the settings of a run are to be changed while it trains or exports."""
    changes_settings = run.kind is StartKind.RESUME and run.overrides
    is_training = any(state.state in ACTIVE_STATES and state.stage in RESUMED_STAGES for state in states)
    if changes_settings and is_training:
        raise BadInput(
            f"{run.plan.run_id} is training; stop it first: "
            f"{wording.program()} cancel {wording.name_of(run.run_dir)} --checkpoint"
        )


def _check_with_sbatch(pending: Sequence[ArrayDraft]) -> list[str]:
    """Have sbatch test each script: only Slurm knows all limits and rules.

    Returns notes about jobs that must wait for nodes. Raises BadInput and SlurmError.
    """
    notes = []
    for draft in pending:
        stage = draft.array.stage
        try:
            reason = sbatch.reason_to_wait(draft.script, stage.partition)
        except SlurmError as error:
            if not is_refusal(error):
                raise
            raise BadInput(f"stage {stage.name}: sbatch refused the script: {error.message}") from None
        if reason:
            notes.append(f"stage {stage.name} cannot start now, and waits in the queue: {reason}")
    return list(dict.fromkeys(notes))


def _submit(run: ResolvedRun, cluster: Cluster, argv: Sequence[str], say: Say) -> list[Submission]:
    """Write the run and submit it, one submitter at a time. Raises BadInput and SlurmError."""
    try:
        with submitting(run.run_dir, run.plan):
            recover(run.run_dir, _stored_plan(run), say)
            states = known_states(run.run_dir, run.plan)
            _check_not_training(run, states)
            write_start(run, argv, states, say)
            write_environment(run.run_dir, run.loaded, cluster.profile)
            return submit_run(run.run_dir, run.plan, cluster.profile, run.stages, say)
    except KeyboardInterrupt:
        say(
            "interrupted; run the same command again to continue, or cancel what Slurm has already accepted: "
            f"{wording.program()} cancel {wording.name_of(run.run_dir)}"
        )
        raise


def _stored_plan(run: ResolvedRun) -> Plan:
    """Return the plan that earlier submits used; a new run has none."""
    return read_plan(run.run_dir) if run.run_dir.plan.exists() and run.kind is not StartKind.NEW else run.plan


def finish(
    run_dir: RunDir,
    plan: Plan,
    submissions: Sequence[Submission],
    request: RunRequest,
    say: Say,
    notes: Sequence[str] = (),
) -> int:
    """Report what was submitted and the next commands; with ``--wait`` wait until the run has ended."""
    if request.wait:
        return wait_until_ended(run_dir, plan, json=request.json)
    if request.json:
        print(wording.to_json({**_as_json(run_dir, plan, submissions), "notes": list(notes)}))
    else:
        say(_next_steps(run_dir, plan))
    return OK


def _next_steps(run_dir: RunDir, plan: Plan) -> str:
    name, program = wording.name_of(run_dir), wording.program()
    commands = {
        "status": "show every stage and element",
        "logs": "show the logs of the ranks; -f follows them",
        "wait": "wait until the run has ended",
        "cancel": "cancel the run; --checkpoint saves first",
    }
    lines = [f"  {program} {command:<6} {name}  {purpose}" for command, purpose in commands.items()]
    return "\n".join([f"{plan.run_id}: {run_dir.root}", "", "next steps", *lines])


def _as_json(run_dir: RunDir, plan: Plan, submissions: Sequence[Submission]) -> dict[str, object]:
    states = read_run(run_dir, plan)
    return {
        "run": plan.run_id,
        "path": str(run_dir.root),
        "state": overall_state(states, any(state.state in ACTIVE_STATES for state in states)),
        "submitted": [
            {"stage": submission.stage, "job": submission.job, "elements": list(submission.elements)}
            for submission in submissions
        ],
    }


def _print_drafts(
    run: ResolvedRun, cluster: Cluster, pending: Sequence[ArrayDraft], notes: Sequence[str], *, json: bool
) -> None:
    """Print exactly the scripts that would be submitted, and the options of sbatch for each."""
    jobs = {draft.array.folder.name: f"<job of {draft.array.folder.name}>" for draft in pending}
    rows = [
        {
            "stage": draft.array.stage.name,
            "elements": list(draft.array.elements),
            "path": str(draft.array.folder / "script.sh"),
            "options": dependency_options(draft, jobs),
            "script": draft.script,
            "step": srun_step.preview(run.run_dir, run.plan, draft.array.stage, cluster.profile),
        }
        for draft in pending
    ]
    if json:
        tree = {"run": run.plan.run_id, "path": str(run.run_dir.root), "scripts": rows, "notes": list(notes)}
        print(wording.to_json(tree))
        return
    for draft in pending:
        options = [*dependency_options(draft, jobs), shlex.quote(str(draft.array.folder / "script.sh"))]
        step = srun_step.preview(run.run_dir, run.plan, draft.array.stage, cluster.profile)
        print(f"# ---- sbatch {' '.join(options)}")
        print(draft.script)
        print(f"# srun step of the first element:\n# {shlex.join(step) or 'each node chooses its container runtime'}")
    if not pending:
        print(f"# nothing to submit: every element of {run.plan.run_id} is done or active")
