"""What a cluster has, as the planner wants to know it: which partition each stage goes to, and what its nodes are like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amlaunch.containers.runtimes.catalog import installed
from amlaunch.launcher.errors import ErrorCollector
from amlaunch.launcher.planning.planner import Site
from amlaunch.launcher.planning.stage_container import Available, containers_of
from amlaunch.launcher.slurm import client
from amlaunch.launcher.slurm.client import Partition, oci_configuration
from amlaunch.launcher.specs.cluster_profile import STAGES, Cluster, ClusterProfile
from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.format.schema import Recipe, StageResources


def cluster_site(loaded: LoadedRecipe, cluster: Cluster, runs: Path, gpus: int | None) -> Site:
    """Describe a cluster to the planner; ``gpus`` overrides the recipe's. Raises BadInput and SlurmError."""
    profile = cluster.profile
    chosen = choose_partitions(client.partitions(), cluster, wanted_gpus(loaded.recipe, gpus))
    train = chosen["train"]
    return Site(
        runs=runs,
        cwd=Path.cwd(),
        gpus=profile.gpus_per_node or train.gpus,
        cpus=train.cpus,
        nodes=train.nodes,
        asked_gpus=gpus,
        cluster={"name": cluster.name, "profile": dict(cluster.tree)},
        defaults={stage: _defaults(profile, stage) for stage in STAGES},
        containers=containers_of(loaded, available_on(cluster, loaded), Path.cwd()),
        partitions={stage: part.name for stage, part in chosen.items()},
    )


def available_on(cluster: Cluster, loaded: LoadedRecipe) -> Available:
    """What starts containers on a cluster, as far as it is seen from here; nodes may have more. Raises SlurmError."""
    if loaded.recipe.container is None:
        return Available((), asks_node=True)
    options = client.step_options()
    mine = (
        ["pyxis"] * ("container-image" in options)
        + installed()
        + ["slurm"] * ("container" in options and bool(oci_configuration(client.config().get("SLURM_CONF", ""))))
    )
    return Available(
        tuple(mine), True, cluster.profile.container, cluster.lines, cluster.source, cluster.profile.images
    )


def wanted_gpus(recipe: Recipe, asked: int | None) -> int:
    """GPUs a node for training, as far as the recipe and the command line say; 1 stands for "what there is"."""
    if asked is not None:
        return asked
    given = recipe.resources.train.gpus_per_node
    return 1 if given is None and not recipe.resources.train.tasks_per_node else given or 0


def _defaults(profile: ClusterProfile, stage: str) -> StageResources:
    own = profile.stage(stage)
    return StageResources(cpus=own.cpus, mem=own.mem, time=own.time)


def choose_partitions(known: Sequence[Partition], cluster: Cluster, gpus: int) -> dict[str, Partition]:
    """The partition of each stage; ``gpus``: of a node that trains. Raises BadInput with all that do not exist."""
    problems, chosen = ErrorCollector(), {}
    for stage in STAGES:
        with problems.collected():
            chosen[stage] = choose_partition(known, cluster, stage, gpus if stage == "train" else 0)
    problems.refuse()
    return chosen


def choose_partition(known: Sequence[Partition], cluster: Cluster, stage: str, gpus: int) -> Partition:
    """The partition of a stage: as the profile says, else Slurm's default, else for GPUs the largest that has them.

    Raises BadInput.
    """
    name = cluster.profile.stage(stage).partition
    if name:
        if "," in name:
            raise BadInput(
                f"{cluster.where(stage, 'partition')} {name!r} is several; write one, for what a job may ask for is looked up there"
            )
        found = next((part for part in known if part.name == name), None)
        if found is None:
            raise BadInput(
                f"{cluster.where(stage, 'partition')} {name!r} does not exist here; {did_you_mean(name, [part.name for part in known])}"
            )
        return found
    if not known:
        raise BadInput("Slurm shows no partition to you (sinfo); ask your administrator")
    able = [part for part in known if part.up and part.gpus >= gpus]
    default = next((part for part in able if part.default), None)
    if default or not able:
        return default or next((part for part in known if part.default), known[0])
    return max(able, key=lambda part: part.nodes)
