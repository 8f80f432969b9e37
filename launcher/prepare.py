"""What ``local`` and ``show`` have in common: from the command line to a recipe and its plan."""

from __future__ import annotations

import argparse
from pathlib import Path

from containers import RUNTIMES
from launcher.machine import Machine, this_machine
from launcher.plan import Plan
from launcher.planner import Site, make_plan
from launcher.store import runs_root
from recipes.errors import BadInput
from recipes.library import find_recipe
from recipes.loader import Loaded, load


def default_recipe(gpus: int | None) -> str:
    """The quickstart; with GPUs asked for, a model that is worth them."""
    return "nanogpt" if gpus else "quickstart"


def prepare(options: argparse.Namespace) -> tuple[Loaded, Plan, Machine]:
    """The checked recipe, its plan on this machine, and the machine."""
    path = find_recipe(options.recipe or default_recipe(options.gpus))
    loaded = load(path, options.overrides, allow=options.allow_target)
    machine = this_machine()
    _check_runtime(loaded)
    site = Site(
        runs=runs_root(options.runs), cwd=Path.cwd(), gpus=len(machine.gpus), cpus=machine.cpus, asked_gpus=options.gpus
    )  # fmt: skip
    if "%" in str(site.runs):
        raise BadInput(f"{site.runs}: submitit reads a % in a path as a job's number; --runs DIR puts runs elsewhere")
    plan = make_plan(loaded, site)
    if options.stage:
        plan.stage(options.stage)
    return loaded, plan, machine


def _check_runtime(loaded: Loaded) -> None:
    container = loaded.recipe.container
    if container and container.runtime not in ("auto", *RUNTIMES):
        raise BadInput(f"{loaded.path}: container.runtime: {container.runtime!r} is not known; known: auto, {', '.join(RUNTIMES)}")


def notes(loaded: Loaded, plan: Plan, machine: Machine) -> list[str]:
    """What the user should know before anything starts."""
    found = list(loaded.notes)
    container = loaded.recipe.container
    if container and container.image and container.runtime != "none":
        found.append(f"container.image {container.image}: on this machine the stages run without a container")
    train = plan.stage("train").needs
    if not train.gpus_per_node and loaded.recipe.resources.train.gpus_per_node:
        wanted = loaded.recipe.resources.train.gpus_per_node
        found.append(f"the recipe is made for {wanted} GPUs; this run trains on the CPU ({machine.cpus} cores), which is far slower")
    return found
