"""``amlaunch submit``: check a recipe and a cluster, then hand all stages to Slurm."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from amlaunch.launcher.checks.containers import check_containers
from amlaunch.launcher.checks.files_and_disk import check_disk, check_needs, check_python
from amlaunch.launcher.checks.slurm_limits import SlurmFacts, check_site, check_stages, memory_notes
from amlaunch.launcher.commands._shared import add_new_run, add_wait, sweep_overrides
from amlaunch.launcher.display import wording
from amlaunch.launcher.errors import ErrorCollector, SlurmError
from amlaunch.launcher.execution import srun_step
from amlaunch.launcher.planning.resolve import check_files, check_inside, container_notes, load_recipe, plan_on_cluster
from amlaunch.launcher.runs.element_state import ElementState, overall, read_run
from amlaunch.launcher.runs.find import runs_root
from amlaunch.launcher.runs.states import ACTIVE_STATES, State
from amlaunch.launcher.runs.submissions import Submission
from amlaunch.launcher.slurm import client, sbatch
from amlaunch.launcher.specs.cluster_profile import Cluster, find_cluster
from amlaunch.launcher.specs.plan import Plan, Stage
from amlaunch.launcher.submission.run_writer import write_run
from amlaunch.launcher.submission.slurm_submission import (
    Draft,
    Say,
    dependency,
    drafts,
    has_refused,
    known_states,
    moved_note,
    recover,
    submit_run,
    submitting,
    write_environment,
)
from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.files import is_locked
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.run_layout import RunDir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch submit``."""
    add_new_run(parser)
    parser.add_argument(
        "--cluster",
        default="slurm",
        metavar="NAME",
        help="a profile in clusters.yaml, a file, or a built-in profile: slurm (asks Slurm), local",
    )
    parser.add_argument("--dry-run", action="store_true", help="print exactly the scripts that would be submitted")
    add_wait(parser)


def run(options: argparse.Namespace) -> int:
    """Submit what is not done; the exit code is 0 once Slurm has it (with ``--wait``: how the run ended)."""
    if not options.recipe:
        raise BadInput(
            "which recipe? amlaunch submit RECIPE --cluster NAME; amlaunch recipes lists those that come with amlaunch"
        )
    options.overrides += sweep_overrides(options.sweep)
    problems = ErrorCollector()
    cluster = _cluster(options, problems)
    if cluster.profile.executor == "local":
        return _on_this_machine(options)
    say = say_for(options)
    options.runs = str(runs_root(options.runs, cluster.profile.runs))
    loaded, plan, notes = _prepared(options, cluster, problems)
    run_dir = _run_dir(Path(options.runs), plan)
    stages = _chosen(plan, options)
    for note in [
        *loaded.notes,
        *container_notes(loaded, plan, f"cluster {cluster.name}"),
        *memory_notes(stages),
        *notes,
    ]:
        say(f"note: {note}")
    _check_run(run_dir, plan, cluster, stages, say)
    if options.dry_run:
        return _print_scripts(run_dir, plan, cluster, stages, options)
    made = _submit(options, loaded, plan, cluster, run_dir, stages, say)
    return finish(options, run_dir, plan, made, say)


def _cluster(options: argparse.Namespace, problems: ErrorCollector) -> Cluster:
    """The cluster. Raises BadInput, with what is wrong with the recipe, too."""
    found: Cluster | None = None
    with problems.collected():
        found = find_cluster(options.cluster)
    if found is None:
        with problems.collected():
            check_recipe(load_recipe(options, runs_root(options.runs), starting=True)[0])
    problems.refuse()
    assert found is not None
    return found


def check_recipe(loaded: LoadedRecipe) -> None:
    """What a recipe needs, wherever it runs, is there. Raises BadInput with all that is not."""
    problems = ErrorCollector()
    for check in (check_needs, check_files):
        with problems.collected():
            check(loaded)
    problems.refuse()


def _prepared(
    options: argparse.Namespace, cluster: Cluster, problems: ErrorCollector
) -> tuple[LoadedRecipe, Plan, list[str]]:
    """The recipe, its plan, and remarks. Raises BadInput with everything that is wrong with recipe, cluster and disk together.

    A check whose own ground is missing (no plan without a recipe) is left out; all others are made.
    """
    runs, asked = Path(options.runs), SlurmFacts()
    made: list[tuple[LoadedRecipe, Plan]] = []
    notes: list[str] = []
    with problems.collected():
        loaded, name = load_recipe(options, runs, starting=True)
        with problems.collected():
            check_recipe(loaded)
        plan, said = _asked(options, loaded, plan_on_cluster(options, loaded, name, cluster, runs), problems)
        made.append((loaded, plan))
        notes += said
        with problems.collected():
            check_stages(loaded, cluster, _chosen(plan, options), asked)
        with problems.collected():
            notes += check_containers(loaded, plan, _run_dir(runs, plan), cluster.profile)
        with problems.collected():
            notes += check_inside(loaded, plan, _run_dir(runs, plan), _chosen(plan, options))
        notes += check_disk(loaded, plan, runs, cluster.profile)
    with problems.collected():
        check_site(cluster, asked)
    with problems.collected():
        notes += check_python(cluster)
    problems.refuse()
    return *made[0], notes


def _asked(
    options: argparse.Namespace, loaded: LoadedRecipe, plan: Plan, problems: ErrorCollector
) -> tuple[Plan, Sequence[str]]:
    """The plan with what registries say of its images, and remarks; what cannot be goes to ``problems``."""
    if not any(stage.container for stage in plan.stages):
        return plan, ()
    from amlaunch.launcher.images.registry_lookup import as_before, ask  # what speaks HTTP takes a while to load

    run_dir = _run_dir(Path(options.runs), plan)
    if run_dir.plan.exists() and all(state.state in (State.DONE, *ACTIVE_STATES) for state in read_run(run_dir, plan)):
        return as_before(run_dir, plan), ()  # nobody waits for a registry where nothing is left to submit
    seen = ask(loaded, plan, say_for(options))
    problems.add(seen.problems)
    return seen.plan, seen.notes


def _run_dir(runs: Path, plan: Plan) -> RunDir:
    return RunDir(runs / plan.run_id, Path(plan.shared) if plan.shared else None)


def _chosen(plan: Plan, options: argparse.Namespace) -> Sequence[Stage]:
    return [plan.stage(options.stage)] if options.stage else plan.stages


def finish(options: argparse.Namespace, run_dir: RunDir, plan: Plan, made: Sequence[Submission], say: Say) -> int:
    """Say what was submitted and what to type next; with ``--wait`` stay until it has ended."""
    if options.wait:
        from amlaunch.launcher.commands.wait import wait_for

        return wait_for(run_dir, plan, options)
    states = read_run(run_dir, plan)
    if options.json:
        print(wording.to_json(_as_json(run_dir, plan, states, made)))
        return OK
    say(closing(run_dir, plan))
    return OK


def _on_this_machine(options: argparse.Namespace) -> int:
    from amlaunch.launcher.commands import local

    if options.dry_run:
        raise BadInput(
            f"cluster {options.cluster!r} runs on this machine, without scripts; amlaunch show prints the plan"
        )
    return local.run(options)


def say_for(options: argparse.Namespace) -> Say:
    """Where words for people go: results alone belong to stdout where a program reads it."""
    stream = sys.stderr if options.json or getattr(options, "dry_run", False) else sys.stdout
    return lambda text: print(text, file=stream, flush=True)


def _check_run(run_dir: RunDir, plan: Plan, cluster: Cluster, stages: Sequence[Stage], say: Say) -> None:
    """What is there already of the run, and sbatch's own word. Nothing is written. Raises BadInput and SlurmError."""
    if is_locked(run_dir.lock):
        raise BadInput(
            f"{plan.run_id} is being run by amlaunch local; follow it with {wording.program()} logs {wording.name_of(run_dir)} -f"
        )
    _check_own(run_dir.root, "--name NAME begins another run")
    _check_own(run_dir.shared.resolve(), "--runs DIR makes shards of your own")
    states = known_states(run_dir, plan)
    note = moved_note(run_dir, plan, cluster.name, states)
    if note:
        say(f"note: {note}")
    _check_input(states, stages)
    _ask_sbatch(_drafts(run_dir, plan, cluster, stages, states))


def _check_own(folder: Path, other: str) -> None:
    """What is there of the run, or of shards that runs share, can be gone on with. Raises BadInput."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder} is not a folder; {other}")
    if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
        raise BadInput(f"{folder} is {_owner(folder)}'s, and you may not write to it; {other}")


def _owner(folder: Path) -> str:
    try:
        return folder.owner()
    except KeyError:  # a number without a name here
        return f"user {folder.stat().st_uid}"


def _check_input(states: Sequence[ElementState], stages: Sequence[Stage]) -> None:
    """A single stage needs what the stages before it make, or are making."""
    chosen = {stage.name for stage in stages}
    before = {name for stage in stages for name in stage.after} - chosen
    for state in states:
        if state.stage in before and state.state not in (State.DONE, *ACTIVE_STATES):
            raise BadInput(
                f"stage {', '.join(chosen)} needs stage {state.stage}, which is neither done nor on its way; submit without --stage"
            )


def _drafts(
    run_dir: RunDir, plan: Plan, cluster: Cluster, stages: Sequence[Stage], states: Sequence[ElementState]
) -> list[Draft]:
    return drafts(run_dir, plan, cluster.profile, states, stages, client.max_array_size())


def _ask_sbatch(found: Sequence[Draft]) -> None:
    """Slurm's own word on each script (``sbatch --test-only``): limits and rules that only it knows."""
    for draft in found:
        try:
            sbatch.test_only(draft.text)
        except SlurmError as error:
            if not has_refused(error):
                raise
            raise BadInput(f"stage {draft.array.stage.name}: sbatch would refuse it: {error.message}") from None


def _print_scripts(
    run_dir: RunDir, plan: Plan, cluster: Cluster, stages: Sequence[Stage], options: argparse.Namespace
) -> int:
    """Exactly the scripts that would be submitted, and the options that each would be given."""
    found = _drafts(run_dir, plan, cluster, stages, known_states(run_dir, plan))
    jobs = {draft.array.folder.name: f"<job of {draft.array.folder.name}>" for draft in found}
    if options.json:
        rows = [
            {
                "stage": d.array.stage.name,
                "elements": list(d.array.elements),
                "path": str(d.array.folder / "script.sh"),
                "options": dependency(d, jobs),
                "script": d.text,
                "step": srun_step.preview(run_dir, plan, d.array.stage, cluster.profile),
            }
            for d in found
        ]
        print(wording.to_json({"run": plan.run_id, "path": str(run_dir.root), "scripts": rows}))
        return OK
    for draft in found:
        print(
            f"# ---- sbatch {' '.join([*dependency(draft, jobs), shlex.quote(str(draft.array.folder / 'script.sh'))])}"
        )
        print(draft.text)
        argv = srun_step.preview(run_dir, plan, draft.array.stage, cluster.profile)
        print(
            f"# the step of its first element:\n# {shlex.join(argv) or 'each node asks what it has to start containers with'}"
        )
    if not found:
        print(f"# nothing to submit: every element of {plan.run_id} is done or on its way")
    return OK


def _submit(
    options: argparse.Namespace,
    loaded: LoadedRecipe,
    plan: Plan,
    cluster: Cluster,
    run_dir: RunDir,
    stages: Sequence[Stage],
    say: Say,
) -> list[Submission]:
    try:
        with submitting(run_dir, plan):
            recover(run_dir, plan, say)
            busy = any(state.state in ACTIVE_STATES for state in known_states(run_dir, plan))
            write_run(run_dir, loaded, plan, options.argv, refresh_code=not busy)
            write_environment(run_dir, loaded, cluster.profile)
            return submit_run(run_dir, plan, cluster.profile, stages, say)
    except KeyboardInterrupt:
        say(
            f"interrupted: the same command goes on; {wording.program()} cancel {wording.name_of(run_dir)} ends what Slurm has already"
        )
        raise


def closing(run_dir: RunDir, plan: Plan) -> str:
    """Where it lies, and what to type next."""
    name, program = wording.name_of(run_dir), wording.program()
    lines = [f"{plan.run_id}: {run_dir.root}", "", "what to type next"]
    commands = [
        ("status", "what happens"),
        ("logs", "what the ranks write; -f follows"),
        ("wait", "until it has ended"),
        ("cancel", "end it; --checkpoint saves first"),
    ]
    width = max(len(command) for command, _ in commands)
    return "\n".join(
        [*lines, *(f"  {program} {command} {name}{' ' * (width - len(command))}  {why}" for command, why in commands)]
    )


def _as_json(
    run_dir: RunDir, plan: Plan, states: Sequence[ElementState], made: Sequence[Submission]
) -> dict[str, object]:
    return {
        "run": plan.run_id,
        "path": str(run_dir.root),
        "state": overall(states, any(state.state in ACTIVE_STATES for state in states)),
        "submitted": [{"stage": one.stage, "job": one.job, "elements": list(one.elements)} for one in made],
    }
