"""Describe a cluster to the planner: the partition of each stage, its nodes, and what can start containers there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from amlaunch.containers.runtimes.catalog import installed
from amlaunch.launcher.errors import ErrorCollector
from amlaunch.launcher.planning.container_plan import SiteRuntimes, containers_of
from amlaunch.launcher.planning.planner import Site
from amlaunch.launcher.slurm import client
from amlaunch.launcher.slurm.client import Partition, oci_configuration
from amlaunch.launcher.specs.cluster_profile import STAGES, Cluster, ClusterProfile
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.format.schema import Recipe, StageResources
from amlaunch.recipes.suggestions import did_you_mean


def cluster_site(loaded: LoadedRecipe, cluster: Cluster, runs: Path, gpus: int | None) -> Site:
    """Describe a cluster to the planner; ``gpus`` overrides the recipe's. Raises BadInput and SlurmError."""
    profile = cluster.profile
    partitions = choose_partitions(client.partitions(), cluster, required_gpus(loaded.recipe, gpus))
    train = partitions["train"]
    return Site(
        runs=runs,
        cwd=Path.cwd(),
        gpus=profile.gpus_per_node or train.gpus,
        cpus=train.cpus,
        nodes=train.nodes,
        requested_gpus=gpus,
        cluster={"name": cluster.name, "profile": dict(cluster.tree)},
        defaults={stage: _default_resources(profile, stage) for stage in STAGES},
        containers=containers_of(loaded, _cluster_runtimes(cluster, loaded), Path.cwd()),
        partitions={stage: partition.name for stage, partition in partitions.items()},
    )


def _cluster_runtimes(cluster: Cluster, loaded: LoadedRecipe) -> SiteRuntimes:
    """Return what can start containers on a cluster, as far as this machine shows it. Raises SlurmError."""
    if loaded.recipe.container is None:
        return SiteRuntimes((), asks_node=True)
    options = client.step_options()
    runtimes = list(installed())
    if "container-image" in options:
        runtimes.insert(0, "pyxis")
    if "container" in options and oci_configuration(client.config().get("SLURM_CONF", "")):
        runtimes.append("slurm")
    profile = cluster.profile
    return SiteRuntimes(tuple(runtimes), True, profile.container, cluster.lines, cluster.source, profile.images)


def required_gpus(recipe: Recipe, gpus: int | None) -> int:
    """Return the GPUs per node that training needs; 1 if neither ``--gpus`` nor the recipe says so."""
    if gpus is not None:
        return gpus
    resources = recipe.resources.train
    if resources.gpus_per_node is None and not resources.tasks_per_node:
        return 1
    return resources.gpus_per_node or 0


def _default_resources(profile: ClusterProfile, stage: str) -> StageResources:
    settings = profile.stage(stage)
    return StageResources(cpus=settings.cpus, mem=settings.mem, time=settings.time)


def choose_partitions(partitions: Sequence[Partition], cluster: Cluster, gpus: int) -> dict[str, Partition]:
    """Choose the partition of each stage; ``gpus`` per node for training. Raises BadInput with all problems."""
    problems = ErrorCollector()
    chosen: dict[str, Partition] = {}
    for stage in STAGES:
        with problems.collected():
            chosen[stage] = choose_partition(partitions, cluster, stage, gpus if stage == "train" else 0)
    problems.raise_if_any()
    return chosen


def choose_partition(partitions: Sequence[Partition], cluster: Cluster, stage: str, gpus: int) -> Partition:
    """Choose a partition: the profile's, else Slurm's default, else the largest with enough GPUs. Raises BadInput."""
    name = cluster.profile.stage(stage).partition
    if name:
        return _partition_named(name, partitions, cluster.where(stage, "partition"))
    if not partitions:
        raise BadInput("Slurm shows you no partitions (check with sinfo); ask your administrator for access")

    default = next((partition for partition in partitions if partition.default), None)
    suitable = [partition for partition in partitions if partition.up and partition.gpus >= gpus]
    if default in suitable or not suitable:
        return default or partitions[0]
    return max(suitable, key=lambda partition: partition.nodes)


def _partition_named(name: str, partitions: Sequence[Partition], where: str) -> Partition:
    """Find a partition by name; ``where`` begins the error. Raises BadInput."""
    if "," in name:
        raise BadInput(
            f"{where} {name!r} lists several partitions; write one (its limits decide what a job may request)"
        )
    for partition in partitions:
        if partition.name == name:
            return partition
    names = [partition.name for partition in partitions]
    raise BadInput(f"{where} {name!r} does not exist on this cluster; {did_you_mean(name, names)}")
