"""``amlaunch resume``: go on with a run, with more steps, more nodes, or other settings that leave its identity alone."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from amlaunch.launcher.checks.files_and_disk import check_disk, check_needs
from amlaunch.launcher.checks.slurm_limits import check_cluster
from amlaunch.launcher.commands._shared import accept_overrides, add_json, add_run, add_wait
from amlaunch.launcher.commands.local import carry_out, driving
from amlaunch.launcher.commands.retry import stages_of
from amlaunch.launcher.commands.submit import finish, say_for
from amlaunch.launcher.display import wording
from amlaunch.launcher.display.live_report import make_report
from amlaunch.launcher.planning.partitions import cluster_site
from amlaunch.launcher.planning.planner import Site, make_plan
from amlaunch.launcher.planning.resolve import check_here
from amlaunch.launcher.runs.element_state import is_driven
from amlaunch.launcher.runs.find import find_run, read_plan, roots
from amlaunch.launcher.runs.states import ACTIVE_STATES
from amlaunch.launcher.runs.stored_recipe import add_resumed, command_of, option_values, stored_recipe
from amlaunch.launcher.specs.cluster_profile import Cluster, check_profile, find_cluster
from amlaunch.launcher.specs.machine import this_machine
from amlaunch.launcher.specs.plan import Plan
from amlaunch.launcher.submission.run_writer import write_run
from amlaunch.launcher.submission.slurm_submission import (
    known_states,
    moved_note,
    recover,
    submit_run,
    submitting,
    write_environment,
)
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import is_locked
from amlaunch.recipes.format.loader import EXECUTION_SECTIONS
from amlaunch.recipes.run_layout import RunDir

FIXED = ("preprocess", "sweep", "dataset", "model", "name")
"""Sections that make a run what it is: with another one it would be another run."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch resume``."""
    add_run(parser)
    parser.add_argument("--cluster", metavar="NAME", help="continue on another cluster than before")
    add_wait(parser)
    add_json(parser, "print the result as JSON on stdout")
    accept_overrides(parser, "RUN")


def run(options: argparse.Namespace) -> int:
    """Change the run's recipe as asked, forget that its training was done, and start what is not done."""
    run_dir = find_run(roots(options.runs), options.run)
    plan = read_plan(run_dir)
    _check_fixed(options.overrides)
    if plan.cluster is None and not options.cluster:
        return _here(options, run_dir, plan)
    return _on_cluster(options, run_dir, plan)


def _here(options: argparse.Namespace, run_dir: RunDir, plan: Plan) -> int:
    """Everything that can be wrong is looked for first: what is changed here is part of the run from then on."""
    if is_driven(run_dir, known_states(run_dir, plan)):
        raise BadInput(f"{plan.run_id} runs; {wording.program()} cancel {wording.name_of(run_dir)} --checkpoint first")
    loaded = stored_recipe(run_dir, options.overrides, job_start=True)
    os.chdir(plan.cwd)
    machine = this_machine()
    asked = option_values(command_of(run_dir), "--gpus")
    site = Site(
        run_dir.root.parent, Path.cwd(), len(machine.gpus), machine.cpus, asked_gpus=int(asked[-1]) if asked else None
    )
    new = make_plan(loaded, site, run_dir.root.name)
    check_here(loaded, new.stages)
    with driving(run_dir):
        forget_training(run_dir, plan, options.overrides)
        write_run(run_dir, loaded, new, options.argv, refresh_code=False)
        add_resumed(run_dir, options.overrides)
        return carry_out(options, make_report(options.json), new, machine, run_dir, stages_of(run_dir, new))


def _on_cluster(options: argparse.Namespace, run_dir: RunDir, plan: Plan) -> int:
    if is_locked(run_dir.lock):
        raise BadInput(
            f"{plan.run_id} is being run by amlaunch local; {wording.program()} cancel {wording.name_of(run_dir)} --checkpoint first"
        )
    cluster = find_cluster(options.cluster) if options.cluster else stored_cluster(plan)
    loaded = stored_recipe(run_dir, options.overrides)
    say = say_for(options)
    os.chdir(plan.cwd)
    options.gpus = None
    check_needs(loaded)
    new = make_plan(loaded, cluster_site(options, loaded, cluster, run_dir.root.parent), run_dir.root.name)
    check_cluster(loaded, cluster, new.stages)
    for note in check_disk(loaded, new, run_dir.root.parent, cluster.profile):
        say(f"note: {note}")
    with submitting(run_dir, new):
        recover(run_dir, plan, say)
        states = known_states(run_dir, plan)
        if options.overrides and any(
            state.state in ACTIVE_STATES and state.stage in ("train", "export") for state in states
        ):
            raise BadInput(
                f"{plan.run_id} trains; {wording.program()} cancel {wording.name_of(run_dir)} --checkpoint first"
            )
        moved = moved_note(run_dir, plan, cluster.name, states)
        if moved:
            say(f"note: {moved}")
        forget_training(run_dir, plan, options.overrides)
        write_run(run_dir, loaded, new, options.argv, refresh_code=False)
        add_resumed(run_dir, options.overrides)
        write_environment(run_dir, loaded, cluster.profile)
        made = submit_run(run_dir, new, cluster.profile, new.stages, say)
    return finish(options, run_dir, new, made, say)


def stored_cluster(plan: Plan) -> Cluster:
    """The cluster that a plan was made for, as it was then."""
    stored = plan.cluster or {}
    tree = stored.get("profile") or {}
    return Cluster(str(stored.get("name")), check_profile(tree, {}), "the run's plan.json", tree)


def _check_fixed(overrides: list[str]) -> None:
    for word in overrides:
        section = word[2:].partition("=")[0].split(".")[0]
        if word.startswith("--") and section in FIXED:
            raise BadInput(
                f"{word}: a run with another {section} is another run; amlaunch submit or local with --{section}… makes it"
            )


def forget_training(run_dir: RunDir, plan: Plan, overrides: list[str]) -> None:
    """Keep the markers of finished training and export under another name, so that both go on; checkpoints stay.

    Settings that only say where a run happens leave what is done alone.
    """
    if all(
        word[2:].partition("=")[0].split(".")[0] in EXECUTION_SECTIONS for word in overrides if word.startswith("--")
    ):
        return
    for stage in plan.stages:
        for element in stage.elements if stage.name in ("train", "export") else []:
            done = run_dir.element(stage.name, element.name).done
            if done.exists():
                done.replace(done.with_name(f"done.before-{int(done.stat().st_mtime)}.json"))
