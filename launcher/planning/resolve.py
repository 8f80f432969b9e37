"""From the command line to a recipe and its plan, on this machine or on a cluster."""

from __future__ import annotations

import argparse
import glob
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amlaunch.containers.runtimes.catalog import installed
from amlaunch.launcher.planning.partitions import cluster_site
from amlaunch.launcher.planning.planner import Site, make_plan, run_id
from amlaunch.launcher.planning.stage_container import Available, containers_of, images_of, inside_of, notes_of
from amlaunch.launcher.runs.element_state import read_stage
from amlaunch.launcher.runs.find import runs_root
from amlaunch.launcher.runs.states import State
from amlaunch.launcher.runs.stored_recipe import resumed_with
from amlaunch.launcher.specs.cluster_profile import Cluster, find_cluster
from amlaunch.launcher.specs.machine import Machine, this_machine
from amlaunch.launcher.specs.plan import Plan, Stage
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.loader import LoadedRecipe, load
from amlaunch.recipes.format.schema import file_sections
from amlaunch.recipes.format.section_checks import raise_problems
from amlaunch.recipes.format.yaml_reader import KeyPath
from amlaunch.recipes.run_layout import RunDir
from amlaunch.recipes.shipped import find_recipe


def default_recipe(gpus: int | None) -> str:
    """The quickstart; with GPUs asked for, a model that is worth them."""
    return "nanogpt" if gpus else "quickstart"


def prepare(options: argparse.Namespace, *, starting: bool) -> tuple[LoadedRecipe, Plan, Machine]:
    """The checked recipe, its plan on this machine, and the machine.

    When nothing is ``starting``, what the machine lacks (nodes, the GPUs of ``--gpus``, variables) is taken to be there.
    """
    machine = this_machine()
    runs = runs_root(options.runs)
    if "%" in str(runs):
        raise BadInput(f"{runs}: submitit reads a % in a path as a job's number; --runs DIR puts runs elsewhere")

    def site(loaded: LoadedRecipe) -> Site:
        gpus, nodes = len(machine.gpus), 1
        if not starting:
            gpus, nodes = max(gpus, options.gpus or 0), loaded.recipe.resources.train.nodes or 1
        inside = containers_of(loaded, available_here(loaded), Path.cwd())
        return Site(runs, Path.cwd(), gpus, machine.cpus, nodes, options.gpus, containers=inside)

    loaded, name = load_recipe(options, runs, starting=starting)
    return loaded, _plan(options, loaded, name, site(loaded)), machine


def plan_on_cluster(options: argparse.Namespace, loaded: LoadedRecipe, name: str, cluster: Cluster, runs: Path) -> Plan:
    """The plan of a recipe, as run ``name``, on a cluster. Raises BadInput and SlurmError."""
    return _plan(options, loaded, name, cluster_site(options, loaded, cluster, runs))


def _plan(options: argparse.Namespace, loaded: LoadedRecipe, name: str, site: Site) -> Plan:
    plan = make_plan(loaded, site, name)
    if options.stage:
        plan.stage(options.stage)
    return plan


def load_recipe(options: argparse.Namespace, runs: Path, *, starting: bool) -> tuple[LoadedRecipe, str]:
    """The checked recipe, and the id of its run; settings that the run was resumed with stay. Raises BadInput."""
    path = find_recipe(options.recipe or default_recipe(options.gpus))
    loaded = load(path, options.overrides, allow=options.allow_target, job_start=starting)
    name = run_id(loaded)
    resumed = resumed_with(RunDir(runs / name))
    if resumed:  # the run has gone on with other settings since; they stay
        loaded = load(path, [*options.overrides, *resumed], allow=options.allow_target, job_start=starting)
        loaded.notes.append(f"{name} was resumed with {' '.join(resumed)}, which stays so; --name N begins another run")
    return loaded, name


PACKAGES = {
    "preprocess": ("numpy", "tiktoken"),
    "verify": ("numpy",),
    "train": ("torch", "numpy", "safetensors"),
    "export": ("torch", "numpy", "safetensors", "tiktoken"),
}
"""What each stage imports."""


def check_here(loaded: LoadedRecipe, stages: list[Stage]) -> None:
    """What can be known of this machine before anything starts: packages, and files that the recipe reads.

    Raises BadInput.
    """
    stages = [stage for stage in stages if stage.container is None]  # an image has its own
    wanted = {package for stage in stages for package in PACKAGES[stage.name]}
    wanted |= {"wandb"} if loaded.recipe.wandb is not None and any(stage.name == "train" for stage in stages) else set()
    missing = sorted(package for package in wanted if importlib.util.find_spec(package) is None)
    if missing:
        extras = "wandb" if missing == ["wandb"] else "train,preprocess,hf"
        raise BadInput(f"not installed here: {', '.join(missing)}; pip install 'amlaunch[{extras}]'")
    check_files(loaded)


def check_files(loaded: LoadedRecipe) -> None:
    """The files that the recipe reads are there. Raises BadInput with all that are not."""
    recipe, missing = loaded.recipe, []
    patterns: dict[KeyPath, Any] = {
        ("preprocess", "data_files"): recipe.preprocess.data_files if recipe.preprocess else None
    }
    patterns |= {(*path, "file_pattern"): node.get("file_pattern") for path, node in file_sections(recipe).items()}
    for key, given in patterns.items():
        for pattern in given if isinstance(given, list) else [given] if given else []:
            if next(glob.iglob(os.path.expanduser(pattern), recursive=True), None) is None:
                missing.append(
                    f"{loaded.lines.get(key, loaded.path)}: {'.'.join(key)}: nothing matches {pattern!r} (seen from {Path.cwd()})"
                )
    raise_problems(missing)


def available_here(loaded: LoadedRecipe) -> Available:
    """What starts containers on this machine; a profile called ``local`` may say more. Raises BadInput."""
    if loaded.recipe.container is None:
        return Available(())
    cluster = find_cluster("local")
    return Available(
        tuple(installed()), False, cluster.profile.container, cluster.lines, cluster.source, cluster.profile.images
    )


def notes(loaded: LoadedRecipe, plan: Plan, machine: Machine) -> list[str]:
    """What the user should know before anything starts on this machine."""
    found = [*loaded.notes, *container_notes(loaded, plan, "this machine")]
    train = plan.stage("train").needs
    if train.nodes > 1:
        found.append(
            f"the recipe asks for {train.nodes} nodes; amlaunch local has this one: add --resources.train.nodes 1"
        )
    if not train.gpus_per_node and loaded.recipe.resources.train.gpus_per_node:
        wanted = loaded.recipe.resources.train.gpus_per_node
        found.append(
            f"the recipe is made for {wanted} GPUs; this run trains on the CPU ({machine.cpus} cores), which is far slower"
        )
    return found


def container_notes(loaded: LoadedRecipe, plan: Plan, where: str) -> list[str]:
    """What is to be known of the stages' containers."""
    return notes_of(loaded, {stage.name: stage.container for stage in plan.stages}, where)


def check_inside(loaded: LoadedRecipe, plan: Plan, run: RunDir, stages: Sequence[Stage]) -> list[str]:
    """Remarks on what the images of ``stages`` hold; what is done already needs nothing. Raises BadInput with all that they lack."""
    left = [
        stage
        for stage in stages
        if stage.container and not all(state.state == State.DONE for state in read_stage(run, stage))
    ]
    inside = inside_of(loaded, left, images_of(plan))
    raise_problems(list(inside.problems) if inside else [])
    return list(inside.notes) if inside else []
