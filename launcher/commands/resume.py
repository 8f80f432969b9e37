"""``amlaunch resume``: go on with a run, with more steps, more nodes, or other settings that leave its identity alone."""

from __future__ import annotations

import argparse
import os
from itertools import pairwise
from pathlib import Path

from launcher import describe
from launcher.cluster import Cluster, check_profile, find_cluster
from launcher.commands.retry import again_here
from launcher.commands.submit import finish, say_for
from launcher.create import add_resumed, write_run
from launcher.plan import Plan
from launcher.planner import make_plan
from launcher.preflight import check_cluster
from launcher.queue import Queue
from launcher.site import cluster_site
from launcher.state import ACTIVE, read_run
from launcher.store import find_run, read_plan, roots
from launcher.submit import recover, submit_run, submitting, write_environment
from recipes.errors import BadInput
from recipes.files import read_object
from recipes.loader import EXECUTION, Loaded, file_targets, load
from recipes.rundir import RunDir

FIXED = ("preprocess", "sweep", "dataset", "model", "name")
"""Sections that make a run what it is: with another one it would be another run."""


def run(options: argparse.Namespace) -> int:
    """Change the run's recipe as asked, forget that its training was done, and start what is not done."""
    run_dir = find_run(roots(options.runs), options.run)
    plan = read_plan(run_dir)
    _check_fixed(options.overrides)
    if plan.cluster is None and not options.cluster:
        if any(state.state in ACTIVE for state in read_run(run_dir, plan)):
            raise BadInput(f"{plan.run_id} runs; {describe.program()} cancel {describe.name_of(run_dir)} --checkpoint first")
        forget_training(run_dir, plan, options.overrides)
        add_resumed(run_dir, options.overrides)
        return again_here(run_dir)
    return _on_cluster(options, run_dir, plan)


def _on_cluster(options: argparse.Namespace, run_dir: RunDir, plan: Plan) -> int:
    cluster = find_cluster(options.cluster) if options.cluster else stored_cluster(plan)
    loaded = stored_recipe(run_dir, options.overrides)
    say = say_for(options)
    os.chdir(plan.cwd)
    options.gpus = None
    new = make_plan(loaded, cluster_site(options, loaded, cluster, run_dir.root.parent), run_dir.root.name)
    check_cluster(loaded, new, cluster, new.stages)
    with submitting(run_dir, new):
        recover(run_dir, plan, say)
        states = read_run(run_dir, plan, Queue(max_age=0))
        if options.overrides and any(state.state in ACTIVE and state.stage in ("train", "export") for state in states):
            raise BadInput(f"{plan.run_id} trains; {describe.program()} cancel {describe.name_of(run_dir)} --checkpoint first")
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


def stored_recipe(run_dir: RunDir, overrides: list[str]) -> Loaded:
    """The run's own recipe, changed; its file targets are those of its snapshot. Raises BadInput."""
    code = run_dir.code / "recipe"
    original = read_object(run_dir.provenance).get("recipe")
    folder = code if code.is_dir() else Path(str(original)).parent
    loaded = load(run_dir.recipe, overrides, recipe_dir=folder, allow=_allowed(run_dir))
    if file_targets(loaded.tree) and not code.is_dir():
        raise BadInput(f"{run_dir.code}: the snapshot of the recipe's own code is gone")
    return loaded


def _allowed(run_dir: RunDir) -> list[str]:
    """What ``--allow-target`` let in when the run was started."""
    words = [str(word) for word in read_object(run_dir.provenance).get("command") or []]
    return [value for option, value in pairwise(words) if option == "--allow-target"] + [word.partition("=")[2] for word in words if word.startswith("--allow-target=")]


def _check_fixed(overrides: list[str]) -> None:
    for word in overrides:
        section = word[2:].partition("=")[0].split(".")[0]
        if word.startswith("--") and section in FIXED:
            raise BadInput(f"{word}: a run with another {section} is another run; amlaunch submit or local with --{section}… makes it")


def forget_training(run_dir: RunDir, plan: Plan, overrides: list[str]) -> None:
    """Keep the markers of finished training and export under another name, so that both go on; checkpoints stay.

    Settings that only say where a run happens leave what is done alone.
    """
    if all(word[2:].partition("=")[0].split(".")[0] in EXECUTION for word in overrides if word.startswith("--")):
        return
    for stage in plan.stages:
        for element in stage.elements if stage.name in ("train", "export") else []:
            done = run_dir.element(stage.name, element.name).done
            if done.exists():
                done.replace(done.with_name(f"done.before-{int(done.stat().st_mtime)}.json"))
