"""``amlaunch retry``: start again what failed, was cancelled or lost, and nothing else."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from amlaunch.launcher.commands._shared import accept_overrides, add_json, add_run, add_wait
from amlaunch.launcher.commands.local import carry_out, driving
from amlaunch.launcher.commands.status import again_command
from amlaunch.launcher.commands.submit import finish, say_for
from amlaunch.launcher.display import wording
from amlaunch.launcher.display.live_report import make_report
from amlaunch.launcher.planning.resolve import check_here
from amlaunch.launcher.runs.element_state import ElementState, is_driven, overall, read_run
from amlaunch.launcher.runs.find import find_run, read_plan, roots
from amlaunch.launcher.runs.states import ACTIVE_STATES, State
from amlaunch.launcher.runs.stored_recipe import command_of, option_values, stored_recipe
from amlaunch.launcher.specs.cluster_profile import check_profile
from amlaunch.launcher.specs.machine import Machine, this_machine
from amlaunch.launcher.specs.plan import Plan, Stage
from amlaunch.launcher.submission.slurm_submission import recover, submit_run, submitting
from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.files import is_locked
from amlaunch.recipes.run_layout import RunDir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``amlaunch retry``."""
    add_run(parser)
    add_wait(parser)
    add_json(parser, "print the result as JSON on stdout")
    accept_overrides(parser, "RUN")  # only to say that resume takes them
    parser.usage = f"{parser.prog} RUN [options]"


def run(options: argparse.Namespace) -> int:
    """Start the unfinished elements of a run as its plan has them: on its cluster, or here."""
    if options.overrides:
        raise BadInput(f"retry changes nothing: amlaunch resume {options.run} {' '.join(options.overrides)}")
    run_dir = find_run(roots(options.runs), options.run)
    plan = read_plan(run_dir)
    if plan.cluster is None:
        return _here(options, run_dir, plan)
    if is_locked(run_dir.lock):
        raise BadInput(
            f"{plan.run_id} is being run by amlaunch local; {wording.program()} status {wording.name_of(run_dir)}"
        )
    profile = check_profile(plan.cluster.get("profile") or {}, {})
    say = say_for(options)
    with submitting(run_dir, plan):
        recover(run_dir, plan, say)
        made = submit_run(run_dir, plan, profile, plan.stages, say)
    if not made:
        say(_nothing(run_dir, plan, read_run(run_dir, plan)))
        if not (options.wait or options.json):
            return OK
    return finish(options, run_dir, plan, made, say)


def _nothing(run_dir: RunDir, plan: Plan, states: Sequence[ElementState]) -> str:
    """Why nothing is started, and what to type instead."""
    going = sum(state.state in ACTIVE_STATES for state in states)
    name, program = wording.name_of(run_dir), wording.program()
    if not going and not is_locked(run_dir.lock):
        return f"{plan.run_id}: every element is done, there is nothing to start again\nnext: {program} status {name}"
    words = (
        f"{going} element{'s are' if going != 1 else ' is'} on {'their' if going != 1 else 'its'} way"
        if going
        else "it runs"
    )
    return f"{plan.run_id}: nothing to start again, {words}\nnext: {program} logs {name} -f, or {program} cancel {name} first"


def _here(options: argparse.Namespace, run_dir: RunDir, plan: Plan) -> int:
    states = read_run(run_dir, plan)
    if is_driven(run_dir, states) or all(state.state == State.DONE for state in states):
        say_for(options)(_nothing(run_dir, plan, states))
        if options.json:
            print(wording.to_json(wording.as_json(run_dir, plan, states, overall(states, is_driven(run_dir, states)))))
        return OK
    return again_here(options, run_dir, plan)


def again_here(options: argparse.Namespace, run_dir: RunDir, plan: Plan) -> int:
    """Carry out on this machine what a run directory holds: its plan, its recipe, its code."""
    machine = this_machine()
    stages = stages_of(run_dir, plan)
    _check_machine(run_dir, plan, stages, machine)
    with driving(run_dir):
        return carry_out(options, make_report(options.json), plan, machine, run_dir, stages)


def stages_of(run_dir: RunDir, plan: Plan) -> list[Stage]:
    """Those that the run was started for (``--stage``)."""
    asked = option_values(command_of(run_dir), "--stage")
    return [plan.stage(asked[-1])] if asked else plan.stages


def _check_machine(run_dir: RunDir, plan: Plan, stages: list[Stage], machine: Machine) -> None:
    """What the run directory and this machine need to have is there. Raises BadInput."""
    for path in (run_dir.recipe, run_dir.code, Path(plan.cwd)):
        if not path.exists():
            raise BadInput(f"{path} is gone, which {plan.run_id} needs; start it anew: {again_command(run_dir, plan)}")
    wanted, there = max(stage.needs.gpus_per_node for stage in stages), len(machine.gpus)
    if wanted > there:
        raise BadInput(
            f"{plan.run_id} trains on {wanted} GPUs, this machine has {there}; give its recipe to amlaunch local --gpus {there}"
        )
    loaded = stored_recipe(run_dir, [], job_start=True)
    os.chdir(plan.cwd)  # where relative paths to data begin
    check_here(loaded, stages)
