"""Check that a profile and the stages of a run fit the cluster: options, partitions, accounts, QOS, sizes, times."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from amlaunch.launcher.display import wording
from amlaunch.launcher.errors import ErrorCollector
from amlaunch.launcher.planning.partitions import choose_partitions
from amlaunch.launcher.slurm import client
from amlaunch.launcher.slurm.client import Partition
from amlaunch.launcher.slurm.sbatch import option_problems
from amlaunch.launcher.specs.cluster_profile import STAGES, Cluster
from amlaunch.launcher.specs.plan import Stage
from amlaunch.recipes.format.loader import LoadedRecipe
from amlaunch.recipes.suggestions import did_you_mean

MIN_SENSIBLE_MEM_MB = 1000
"""Python with torch alone takes about 400."""
MB_PER_UNIT = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
MIN_WORK_SECONDS = 60
"""A job needs at least this long before it is signalled to save."""


class SlurmFacts:
    """Cached answers from Slurm about the cluster. Raises SlurmError if Slurm does not answer."""

    @cached_property
    def partitions(self) -> dict[str, Partition]:
        """Return all partitions that the user sees, by name."""
        return {partition.name: partition for partition in client.partitions()}

    @cached_property
    def rules(self) -> Mapping[str, Mapping[str, str]]:
        """Return the settings of each partition, as ``scontrol show partition`` prints them."""
        return client.partition_rules()

    @cached_property
    def associations(self) -> tuple[set[str], set[str], str]:
        """Return the user's accounts, QOS and default account; empty if accounting does not answer."""
        # Then sbatch decides.
        return client.associations() or (set(), set(), "")


def check_slurm_limits(cluster: Cluster, loaded: LoadedRecipe | None, stages: Sequence[Stage]) -> list[str]:
    """Check that a profile's settings exist and are open to the user, and that the stages fit their partitions.

    ``loaded``: the recipe of the stages; None if there is no plan, then only the profile is checked.
    Returns notes. Raises BadInput with all problems, and SlurmError.
    """
    problems, facts = ErrorCollector(), SlurmFacts()
    notes: list[str] = []
    if loaded is not None:
        with problems.collected():
            for stage in stages:
                problems.add(_StageCheck(loaded, cluster, stage, facts).problems())
            notes += [*_memory_notes(stages), *_partition_notes(stages, facts)]
    with problems.collected():
        problems.add(option_problems(cluster))
        with problems.collected():
            choose_partitions(list(facts.partitions.values()), cluster, 0)
        problems.add(_association_problems(cluster, facts))
    problems.raise_if_any()
    return notes


def _memory_notes(stages: Sequence[Stage]) -> list[str]:
    """Warn about stages without a mem setting if the cluster's default is too small. Raises SlurmError."""
    default_mb = client.config().get("DefMemPerCPU", "")
    if not default_mb.isdigit():
        return []

    notes = []
    for stage in stages:
        mem_mb = int(default_mb) * _cpus(stage)
        if not stage.needs.mem and mem_mb < MIN_SENSIBLE_MEM_MB:
            notes.append(
                f"{stage.name} has no mem setting, so Slurm's default of {mem_mb} MB applies; "
                f"set resources.{stage.name}.mem, or mem in the profile"
            )
    return notes


def _partition_notes(stages: Sequence[Stage], facts: SlurmFacts) -> list[str]:
    """Name partitions that queue jobs and start none."""
    names = dict.fromkeys(stage.partition or "" for stage in stages)
    down = [name for name in names if facts.rules.get(name, {}).get("State") == "DOWN"]
    return [f"partition {name} is down; jobs wait in the queue until it is up" for name in down]


class _StageCheck:
    """Compare one stage with its partition; each problem starts with the line that set the value."""

    def __init__(self, loaded: LoadedRecipe, cluster: Cluster, stage: Stage, facts: SlurmFacts):
        self.loaded = loaded
        self.cluster = cluster
        self.stage = stage
        self.facts = facts

    def problems(self) -> Iterator[str]:
        """List everything that does not fit."""
        partition = self.facts.partitions.get(self.stage.partition or "")
        if partition is None:
            # The partition existed when the plan was made.
            name = self.stage.partition or ""
            hint = did_you_mean(name, self.facts.partitions)
            yield f"{self.cluster.source}: partition {name!r} does not exist; {hint}"
            return
        rules = self.facts.rules.get(partition.name, {})
        yield from self._size_problems(partition)
        yield from self._time_problems(partition, client.limit_minutes(rules.get("DefaultTime", "")))
        yield from self._rule_problems(rules)

    def _where(self, key: str) -> str:
        """Return the place that set ``key`` and its name, such as ``r.yaml:7: resources.train.mem``; empty if unset."""
        path = ("resources", self.stage.name, key)
        if getattr(getattr(self.loaded.recipe.resources, self.stage.name), key) is not None:
            return f"{self.loaded.lines.get(path, self.loaded.path)}: {'.'.join(path)}"
        return self.cluster.where(self.stage.name, key)

    def _size_problems(self, partition: Partition) -> Iterator[str]:
        needs = self.stage.needs
        node = f"a node of partition {partition.name} has at most"
        if needs.nodes > partition.nodes:
            count = f"{partition.nodes} node{'s' * (partition.nodes != 1)}"
            yield f"{self._where('nodes')} is {needs.nodes}, but partition {partition.name} has {count}"

        if needs.gpus_per_node > partition.gpus:
            from_option = needs.gpus_per_node != self.loaded.recipe.resources.train.gpus_per_node
            gpus = f"{partition.gpus} GPU{'s' * (partition.gpus != 1)}"
            key = "--gpus" if from_option else self._where("gpus_per_node")
            yield f"{key} is {needs.gpus_per_node}, but {node} {gpus}; {self._gpu_partitions()}"
        elif _cpus(self.stage) > partition.most_cpus:
            # Reported only if the GPUs fit, because the CPUs are derived from them.
            key = "cpus" if needs.cpus > needs.tasks_per_node else "tasks_per_node"
            where = self._where(key) or f"resources.{self.stage.name}.{key}"
            cpus = f"{partition.most_cpus} CPU{'s' * (partition.most_cpus != 1)}"
            yield f"{where} is {_cpus(self.stage)}, but {node} {cpus}"

        if needs.mem and partition.most_mem_mb and megabytes(needs.mem) > partition.most_mem_mb:
            yield f"{self._where('mem')} is {needs.mem}, but {node} {partition.most_mem_mb} MB"

    def _gpu_partitions(self) -> str:
        names = [f"{part.name} ({part.gpus})" for part in self.facts.partitions.values() if part.gpus]
        return f"partitions with GPUs: {', '.join(names) or 'none'}"

    def _time_problems(self, partition: Partition, default_minutes: int | None) -> Iterator[str]:
        minutes = self.stage.needs.time_minutes or default_minutes
        if minutes is None:
            return
        unset = f"partition {partition.name}'s default time (resources.{self.stage.name}.time overrides it)"
        where = self._where("time") or unset
        if partition.minutes is not None and minutes > partition.minutes:
            time, limit = wording.duration(minutes * 60), wording.duration(partition.minutes * 60)
            yield f"{where} is {time}, but partition {partition.name} allows at most {limit}"

        signal_seconds = self.cluster.profile.signal_seconds
        if minutes * 60 <= signal_seconds + MIN_WORK_SECONDS:
            yield (
                f"{where} is {minutes} min, but jobs are asked to save {signal_seconds} s before the limit, "
                "which leaves no time for work; set a longer time, or a smaller signal_seconds in the profile"
            )

    def _rule_problems(self, rules: Mapping[str, str]) -> Iterator[str]:
        name, partition = self.stage.name, self.stage.partition
        remedy = f"choose another one for stage {name} (stages.{name}.partition in the profile)"
        state = rules.get("State", "UP")
        # A partition that is DOWN queues jobs; see _partition_notes.
        if state in ("DRAIN", "INACTIVE"):
            yield f"partition {partition} is {state.lower()}; {remedy}"

        settings = self.cluster.profile.stage(name)
        account = settings.account or self.facts.associations[2]
        for label, key, value in (("accounts", "AllowAccounts", account), ("QOS", "AllowQos", settings.qos)):
            # Slurm prints ALL where there is no restriction.
            allowed = rules.get(key, "ALL")
            if value and allowed != "ALL" and value not in allowed.split(","):
                yield f"partition {partition} accepts only these {label}: {allowed}; yours is {value}; {remedy}"


def _association_problems(cluster: Cluster, facts: SlurmFacts) -> Iterator[str]:
    accounts, qos, _ = facts.associations
    for stage in STAGES:
        settings = cluster.profile.stage(stage)
        for key, label, value, available in (
            ("account", "accounts", settings.account, accounts),
            ("qos", "QOS", settings.qos, qos),
        ):
            if value and available and value not in available:
                where = cluster.where(stage, key)
                yield f"{where} {value!r} is not one of your {label}; {did_you_mean(value, available)}"


def _cpus(stage: Stage) -> int:
    """Return the CPUs that a job of the stage gets on each node: at least one a task."""
    return max(stage.needs.cpus, stage.needs.tasks_per_node)


def megabytes(text: str) -> int:
    """Convert a Slurm memory size such as ``64G`` to megabytes, Slurm's default unit, rounded up.

    See :func:`amlaunch.recipes.format.schema.parse_memory`.
    """
    unit = text[-1] if text[-1] in MB_PER_UNIT else ""
    return math.ceil(int(text.removesuffix(unit)) * MB_PER_UNIT[unit or "M"])
