"""Resolve a recipe: load it, and plan it for this machine or for a cluster."""

from __future__ import annotations

from pathlib import Path

from amlaunch.containers.runtimes.catalog import installed
from amlaunch.launcher.planning.container_plan import SiteRuntimes, container_notes, containers_of
from amlaunch.launcher.planning.partitions import cluster_site
from amlaunch.launcher.planning.planner import Site, make_plan, run_id
from amlaunch.launcher.planning.run_request import RunRequest
from amlaunch.launcher.runs.find import runs_root
from amlaunch.launcher.runs.stored_recipe import resumed_with
from amlaunch.launcher.specs.cluster_profile import Cluster, find_cluster
from amlaunch.launcher.specs.machine import this_machine
from amlaunch.launcher.specs.plan import Plan
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.loader import LoadedRecipe, load
from amlaunch.recipes.output import counted
from amlaunch.recipes.run_layout import RunDir
from amlaunch.recipes.shipped import find_recipe


def default_recipe(gpus: int | None) -> str:
    """Return the recipe to run if none is named: the quickstart, or with GPUs a larger model."""
    return "nanogpt" if gpus else "quickstart"


def load_recipe(request: RunRequest, runs: Path, *, starting: bool) -> tuple[LoadedRecipe, Path]:
    """Load and check the recipe, and name its run directory below ``runs``.

    Overrides that an existing run was resumed with are kept. ``starting`` requires a value for every ``${VAR}``.
    Raises BadInput.
    """
    path = find_recipe(request.recipe or default_recipe(request.gpus))
    allow = list(request.allow_target)
    loaded = load(path, list(request.overrides), allow=allow, job_start=starting)

    root = runs / run_id(loaded)
    resumed = resumed_with(RunDir(root))
    if resumed:
        loaded = load(path, [*request.overrides, *resumed], allow=allow, job_start=starting)
        loaded.notes.append(
            f"{root.name} was resumed with {' '.join(resumed)}, which still applies; "
            "to start another run, add --name NAME"
        )
    if not request.recipe:
        loaded.notes.append(f"no recipe given: using {path.stem}; amlaunch recipes lists the others")
    return loaded, root


def plan_run(
    loaded: LoadedRecipe, root: Path, cluster: Cluster | None, gpus: int | None, *, starting: bool = True
) -> Plan:
    """Plan a recipe as the run in ``root``, on a cluster or (None) on this machine.

    ``gpus`` overrides the recipe's number of GPUs. If nothing is ``starting``, missing nodes and GPUs of this machine
    are assumed to exist. Raises BadInput and, on a cluster, SlurmError.
    """
    runs = root.parent
    if cluster is not None:
        site = cluster_site(loaded, cluster, runs, gpus)
    else:
        site = _local_site(loaded, runs, gpus, starting=starting)
    return make_plan(loaded, site, root.name)


def _local_site(loaded: LoadedRecipe, runs: Path, gpus: int | None, *, starting: bool) -> Site:
    if "%" in str(runs):
        raise BadInput(
            f"{runs}: a path with a % does not work (submitit replaces it with a job ID); "
            "choose another folder with --runs DIR"
        )
    machine = this_machine()
    available_gpus, nodes = len(machine.gpus), 1
    if not starting:
        available_gpus = max(available_gpus, gpus or 0)
        nodes = loaded.recipe.resources.train.nodes or 1
    containers = containers_of(loaded, _local_runtimes(loaded), Path.cwd())
    return Site(runs, Path.cwd(), available_gpus, machine.cpus, nodes, gpus, containers=containers)


def _local_runtimes(loaded: LoadedRecipe) -> SiteRuntimes:
    """Return what can start containers on this machine; a profile named ``local`` may add settings. Raises BadInput."""
    if loaded.recipe.container is None:
        return SiteRuntimes(())
    cluster = find_cluster("local")
    profile = cluster.profile
    return SiteRuntimes(tuple(installed()), False, profile.container, cluster.lines, cluster.source, profile.images)


def run_dir_of(root: Path, plan: Plan) -> RunDir:
    """Return the run directory of a plan that was just made."""
    return RunDir(root, Path(plan.shared) if plan.shared else None)


def plan_to_show(request: RunRequest) -> tuple[LoadedRecipe, Plan, RunDir]:
    """Load and plan a recipe for ``amlaunch show``, on this machine. Raises BadInput."""
    loaded, root = load_recipe(request, runs_root(request.runs), starting=False)
    plan = plan_run(loaded, root, None, request.gpus, starting=False)
    if request.stage:
        plan.stage(request.stage)
    return loaded, plan, run_dir_of(root, plan)


def local_notes(loaded: LoadedRecipe, plan: Plan) -> list[str]:
    """List what to know before a plan runs on this machine, the most important first."""
    notes = []
    train = plan.stage("train").needs
    if train.nodes > 1:
        notes.append(
            f"the recipe uses {train.nodes} nodes, but amlaunch local uses only this one; add --resources.train.nodes 1"
        )
    recipe_gpus = loaded.recipe.resources.train.gpus_per_node
    if recipe_gpus and not train.gpus_per_node:
        notes.append(
            f"the recipe is written for {counted(recipe_gpus, 'GPU')}; this run trains on the CPU "
            f"({this_machine().cpus} cores), which is far slower"
        )
    return [*notes, *loaded.notes, *container_notes(loaded, plan, "this machine")]
