"""``amlaunch retry``: start again what failed, was cancelled or lost, and nothing else."""

from __future__ import annotations

import argparse
import os

from launcher import describe
from launcher.cluster import check_profile
from launcher.commands.submit import finish, say_for
from launcher.store import find_run, read_plan, roots
from launcher.submit import recover, submit_run, submitting
from recipes.errors import BadInput
from recipes.files import is_locked, read_object
from recipes.rundir import RunDir


def run(options: argparse.Namespace) -> int:
    """Submit the unfinished elements of a run as its plan has them; on this machine, the command that began it."""
    if options.overrides:
        raise BadInput(f"retry changes nothing: amlaunch resume {options.run} {' '.join(options.overrides)}")
    run_dir = find_run(roots(options.runs), options.run)
    plan = read_plan(run_dir)
    if plan.cluster is None:
        return again_here(run_dir)
    if is_locked(run_dir.lock):
        raise BadInput(f"{plan.run_id} is being run by amlaunch local; {describe.program()} status {describe.name_of(run_dir)}")
    profile = check_profile(plan.cluster.get("profile") or {}, {})
    say = say_for(options)
    with submitting(run_dir, plan):
        recover(run_dir, plan, say)
        made = submit_run(run_dir, plan, profile, plan.stages, say)
    if not made:
        say(f"{plan.run_id}: nothing to start again: every element is done or on its way")
    return finish(options, run_dir, plan, made, say)


def again_here(run_dir: RunDir) -> int:
    """The command that began a run of this machine, in the folder where it was typed."""
    from launcher.cli import run as run_command

    made = read_object(run_dir.provenance)
    words = made.get("command")
    if not isinstance(words, list) or not os.path.isdir(str(made.get("cwd"))):
        raise BadInput(f"{run_dir.provenance} does not say how the run was started; give its recipe to amlaunch local")
    os.chdir(str(made["cwd"]))
    print(f"amlaunch {' '.join(map(str, words[1:]))}", flush=True)
    return run_command([*map(str, words[1:]), *([] if "--runs" in words else ["--runs", str(run_dir.root.parent)])])


