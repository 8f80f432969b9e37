"""Whether a recipe fits a cluster, as far as Slurm can be asked by name: options, partitions, accounts, QOS, sizes, times."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from amlaunch.launcher.display import wording
from amlaunch.launcher.errors import ErrorCollector
from amlaunch.launcher.planning.partitions import choose_partitions
from amlaunch.launcher.slurm import client
from amlaunch.launcher.slurm.client import Partition
from amlaunch.launcher.slurm.sbatch import option_problems
from amlaunch.launcher.specs.cluster_profile import STAGES, Cluster
from amlaunch.launcher.specs.plan import Stage
from amlaunch.recipes.errors import did_you_mean
from amlaunch.recipes.format.loader import LoadedRecipe

LITTLE_MEGA = 1000
"""Python with torch alone takes about 400."""
MEGA = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


class Asked:
    """What Slurm says of the site, each thing asked for once. Raises SlurmError where it is silent."""

    @cached_property
    def partitions(self) -> dict[str, Partition]:
        """All that the user sees, by name."""
        return {part.name: part for part in client.partitions()}

    @cached_property
    def rules(self) -> Mapping[str, Mapping[str, str]]:
        """Of each partition."""
        return client.partition_rules()

    @cached_property
    def associations(self) -> tuple[set[str], set[str], str]:
        """The user's accounts, QOS and default account; empty where accounting cannot be asked: sbatch has the last word."""
        return client.associations() or (set(), set(), "")


def check_cluster(loaded: LoadedRecipe, cluster: Cluster, stages: Sequence[Stage]) -> None:
    """A profile and the stages of a plan that was made with it. Raises BadInput with everything that is wrong, and SlurmError."""
    problems, asked = ErrorCollector(), Asked()
    with problems.collected():
        check_site(cluster, asked)
    with problems.collected():
        check_stages(loaded, cluster, stages, asked)
    problems.refuse()


def check_site(cluster: Cluster, asked: Asked) -> None:
    """What a profile names is there and the user's own, whatever the recipe. Raises BadInput with all of it, and SlurmError."""
    problems = ErrorCollector()
    problems.add(option_problems(cluster))
    with problems.collected():
        choose_partitions(list(asked.partitions.values()), cluster, 0)
    problems.add(_association_problems(cluster, asked))
    problems.refuse()


def check_stages(loaded: LoadedRecipe, cluster: Cluster, stages: Sequence[Stage], asked: Asked) -> None:
    """The stages fit the nodes and the rules of their partitions. Raises BadInput with all that does not, and SlurmError."""
    problems, known = ErrorCollector(), asked.partitions
    for stage in stages:
        part = known.get(stage.partition or "")
        if part is None:  # from one look at Slurm to the next
            problems.add(
                [
                    f"{cluster.source}: partition {stage.partition!r} does not exist here; {did_you_mean(stage.partition or '', known)}"
                ]
            )
            continue
        rule = asked.rules.get(part.name, {})
        problems.add(_size_problems(loaded, cluster, stage, part, known))
        problems.add(_time_problems(loaded, cluster, stage, part, client.minutes_of(rule.get("DefaultTime", ""))))
        problems.add(_rule_problems(cluster, stage, rule, asked.associations[2]))
    problems.refuse()


def where_set(loaded: LoadedRecipe, cluster: Cluster, stage: str, key: str) -> str:
    """Who set a stage's ``key``, for the start of a sentence: ``r.yaml:7: resources.train.mem``, ``clusters.yaml:3: mem``; empty: nobody."""
    path = ("resources", stage, key)
    if getattr(getattr(loaded.recipe.resources, stage), key) is not None:
        return f"{loaded.lines.get(path, loaded.path)}: {'.'.join(path)}"
    return cluster.where(stage, key)


def _size_problems(
    loaded: LoadedRecipe, cluster: Cluster, stage: Stage, part: Partition, known: Mapping[str, Partition]
) -> Iterable[str]:
    needs, name = stage.needs, stage.name
    node = f"a node of partition {part.name} has"
    if needs.nodes > part.nodes:
        yield f"{where_set(loaded, cluster, name, 'nodes')} is {needs.nodes}, partition {part.name} has {part.nodes}"
    if needs.gpus_per_node > part.gpus:
        asked = needs.gpus_per_node != loaded.recipe.resources.train.gpus_per_node
        key = (
            f"--gpus {needs.gpus_per_node}:"
            if asked
            else f"{where_set(loaded, cluster, name, 'gpus_per_node')} is {needs.gpus_per_node},"
        )
        yield f"{key} {node} {part.gpus}; partitions with GPUs: {_with_gpus(known)}"
    cpus = max(needs.cpus, needs.tasks_per_node)
    if cpus > part.most_cpus and needs.gpus_per_node <= part.gpus:  # else so many come with the GPUs
        key = "cpus" if needs.cpus > needs.tasks_per_node else "tasks_per_node"
        yield f"{where_set(loaded, cluster, name, key) or f'resources.{name}.{key}'} is {cpus}, {node} {part.most_cpus} CPUs"
    if needs.mem and part.most_mem_mb and megabytes(needs.mem) > part.most_mem_mb:
        yield f"{where_set(loaded, cluster, name, 'mem')} is {needs.mem}, {node} {part.most_mem_mb} MB"


def _time_problems(
    loaded: LoadedRecipe, cluster: Cluster, stage: Stage, part: Partition, default: int | None
) -> Iterable[str]:
    minutes = stage.needs.time_minutes or default
    if minutes is None:
        return
    who = (
        where_set(loaded, cluster, stage.name, "time")
        or f"the default time of partition {part.name} (resources.{stage.name}.time asks for another)"
    )
    if part.minutes is not None and minutes > part.minutes:
        yield f"{who} is {wording.duration(minutes * 60)}, partition {part.name} allows {wording.duration(part.minutes * 60)}"
    warning = cluster.profile.signal_seconds
    if minutes * 60 <= warning + 60:
        yield f"{who} is {minutes} min, and a job is told to save {warning} s before its end: nothing is left to work in; give it more time, or lower the profile's signal_seconds"


def _rule_problems(cluster: Cluster, stage: Stage, rule: Mapping[str, str], default: str) -> Iterable[str]:
    """Slurm says ALL where everybody may come in."""
    own = cluster.profile.stage(stage.name)
    if rule.get("State", "UP") != "UP":
        yield f"partition {stage.partition} is {rule['State'].lower()}; choose another one for stage {stage.name} (stages.{stage.name}.partition)"
    for word, key, mine in (("accounts", "AllowAccounts", own.account or default), ("qos", "AllowQos", own.qos)):
        allowed = rule.get(key, "ALL")
        if mine and allowed != "ALL" and mine not in allowed.split(","):
            yield f"partition {stage.partition} is for the {word} {allowed} alone, yours is {mine}; choose another one for stage {stage.name}"


def _with_gpus(known: Mapping[str, Partition]) -> str:
    return ", ".join(f"{part.name} ({part.gpus})" for part in known.values() if part.gpus) or "none"


def megabytes(text: str) -> int:
    """``64G`` in megabytes (Slurm's default unit), rounded up; see :func:`amlaunch.recipes.format.schema.parse_memory`."""
    unit = text[-1] if text[-1] in MEGA else ""
    return math.ceil(int(text.removesuffix(unit)) * MEGA[unit or "M"])


def _association_problems(cluster: Cluster, asked: Asked) -> Iterable[str]:
    accounts, qos, _ = asked.associations
    for stage in STAGES:
        own = cluster.profile.stage(stage)
        for key, given, mine in (("account", own.account, accounts), ("qos", own.qos, qos)):
            if given and mine and given not in mine:
                yield f"{cluster.where(stage, key)} {given!r} is not yours; {did_you_mean(given, mine)}"


def memory_notes(stages: Sequence[Stage]) -> list[str]:
    """Said where nobody gives a stage its memory and the site's own default is too small for anything. Raises SlurmError."""
    default = client.config().get("DefMemPerCPU", "")
    if not default.isdigit():
        return []
    small = [
        (stage, int(default) * max(stage.needs.cpus, stage.needs.tasks_per_node))
        for stage in stages
        if not stage.needs.mem
    ]
    return [
        f"stage {stage.name} asks for no memory, and Slurm gives it {mega} MB; resources.{stage.name}.mem, or mem in the profile, asks for more"
        for stage, mega in small
        if mega < LITTLE_MEGA
    ]
