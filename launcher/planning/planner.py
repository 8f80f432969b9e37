"""Plan a recipe for a site: stages, elements, resources. Pure: nothing is read, written or started."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amlaunch.launcher.specs.plan import Element, Needs, Plan, Stage, StageContainer
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.consistency import check_batch, check_ranks
from amlaunch.recipes.format.loader import LoadedRecipe, file_targets, recipe_at_point, shards_folder_name
from amlaunch.recipes.format.schema import Preprocess, StageResources
from amlaunch.recipes.output import counted
from amlaunch.recipes.run_layout import RunDir

DEFAULT_HANG_MINUTES = 30
CLUSTER_EXPORT_CPUS = 4
"""CPUs of an export on a cluster, a single process that copies and samples."""

SweepPoint = Mapping[str, Any]
"""Overrides of one point of a sweep; empty without a sweep."""


@dataclass(frozen=True)
class Site:
    """The place where a plan will run, as far as the planner needs to know it."""

    runs: Path
    """Folder of the run directories."""
    cwd: Path
    """Folder where relative paths in the recipe start."""
    gpus: int
    """GPUs per node."""
    cpus: int
    """CPUs per node."""
    nodes: int = 1
    """Available nodes."""
    requested_gpus: int | None = None
    """``--gpus``; None: the recipe's, or the available GPUs."""
    cluster: Mapping[str, Any] | None = None
    """Name and profile of the cluster; None: this machine, all of whose CPUs an element may use."""
    defaults: Mapping[str, StageResources] = field(default_factory=dict)
    """Resources of a stage's elements that the recipe does not set."""
    containers: Mapping[str, StageContainer | None] = field(default_factory=dict)
    """Container of each stage."""
    partitions: Mapping[str, str | None] = field(default_factory=dict)
    """Partition of each stage."""


def run_id(loaded: LoadedRecipe) -> str:
    """Name the run of a recipe: the recipe's name and a fingerprint of its result. The same recipe is the same run."""
    return f"{loaded.recipe.name}-{loaded.fingerprint()}"


def make_plan(loaded: LoadedRecipe, site: Site, name: str | None = None) -> Plan:
    """Plan a recipe for a site; ``name``: the ID of an existing run to continue. Raises BadInput if they do not fit."""
    section = loaded.recipe.preprocess
    data = _data_folder(loaded, section, site) if section else None
    shared = data if section and not section.output_dir else None
    run_dir = RunDir(site.runs / (name or run_id(loaded)), shared)

    planner = _Planner(loaded, site, run_dir, data)
    stages = [
        dataclasses.replace(stage, partition=site.partitions.get(stage.name), container=site.containers.get(stage.name))
        for stage in planner.stages()
    ]
    return Plan(
        run_id=run_dir.root.name,
        stages=stages,
        data=str(data) if data else None,
        cwd=str(site.cwd),
        # Placeholders are kept: the driver fills them in.
        env=(loaded.tree.get("container") or {}).get("env") or {},
        cluster=dict(site.cluster) if site.cluster else None,
        shared=str(shared) if shared else None,
    )


def _data_folder(loaded: LoadedRecipe, section: Preprocess, site: Site) -> Path:
    """Return the folder of the shards: the recipe's, or one named by its contents, which runs share."""
    if section.output_dir:
        return (site.cwd / Path(section.output_dir).expanduser()).resolve()
    return site.runs.resolve().parent / "data" / shards_folder_name(section, loaded.data_paths("preprocess"))


@dataclass(frozen=True)
class _Planner:
    """Plans the stages of one run."""

    loaded: LoadedRecipe
    site: Site
    run_dir: RunDir
    data: Path | None
    """Folder of the shards; None: the recipe has no preprocess section."""

    def stages(self) -> list[Stage]:
        """Return the stages in the order in which they run."""
        recipe = self.loaded.recipe
        stages = self._preprocess_stages(recipe.preprocess, self.data) if recipe.preprocess and self.data else []
        stages.append(self._train_stage(after=["verify"] if self.data else []))
        if recipe.export:
            stages.append(self._export_stage())
        return stages

    def _preprocess_stages(self, section: Preprocess, data: Path) -> list[Stage]:
        """Return the stage that makes the shards, and the one that verifies them."""
        resources = self.loaded.recipe.resources
        default_workers = 1 if self.site.cluster else max(1, self.site.cpus // section.elements)
        needs = self._needs("preprocess", resources.preprocess, cpus=section.num_workers or default_workers)
        workers = section.num_workers or needs.cpus
        arguments = ["element", *self._common_arguments(), "--out", str(data), "--workers", str(workers)]
        parts = [
            self._element(
                "preprocess",
                str(index),
                "amlaunch.preprocess",
                [*arguments, "--index", str(index)],
                f"part {index + 1} of {section.elements}",
            )
            for index in range(section.elements)
        ]
        verify_arguments = ["verify", *self._common_arguments(), "--out", str(data)]
        verify = self._element("verify", "0", "amlaunch.preprocess", verify_arguments)
        return [
            Stage("preprocess", parts, [], needs),
            Stage("verify", [verify], ["preprocess"], self._needs("verify", resources.verify, cpus=1)),
        ]

    def _train_stage(self, after: list[str]) -> Stage:
        needs = self._train_needs()
        elements = []
        for index, point in enumerate(self.loaded.elements()):
            name = str(index)
            element_id = f"{self.run_dir.root.name}-{name}" if point else self.run_dir.root.name
            arguments = [*self._checkpoint_arguments(name), "--run-id", element_id, *self._point_arguments(point)]
            elements.append(self._element("train", name, "amlaunch.trainer", arguments, _title(point)))
        return Stage("train", elements, after, needs)

    def _export_stage(self) -> Stage:
        elements = []
        for index, point in enumerate(self.loaded.elements()):
            name = str(index)
            out = str(self.run_dir.export(name))
            arguments = [*self._checkpoint_arguments(name), "--out", out, *self._point_arguments(point)]
            elements.append(self._element("export", name, "amlaunch.trainer.tools.export", arguments, _title(point)))
        cpus = min(self.site.cpus, CLUSTER_EXPORT_CPUS) if self.site.cluster else self.site.cpus
        needs = self._needs("export", self.loaded.recipe.resources.export, cpus)
        return Stage("export", elements, ["train"], needs, elementwise=True)

    # --- arguments of elements

    def _element(self, stage: str, name: str, module: str, arguments: Sequence[str], title: str = "") -> Element:
        folder = self.run_dir.element(stage, name).root
        return Element(name, module, [*arguments, "--element", str(folder)], title)

    def _common_arguments(self) -> list[str]:
        """Return the arguments of every stage: the stored recipe, and what its targets may use."""
        folder = self.run_dir.code / "recipe" if file_targets(self.loaded.tree) else self.run_dir.root
        allowed = [argument for name in self.loaded.policy.allow for argument in ("--allow-target", name)]
        return [str(self.run_dir.recipe_json), "--recipe-dir", str(folder), *allowed]

    def _checkpoint_arguments(self, name: str) -> list[str]:
        """Return the arguments that training and export of one element share."""
        folder = self.run_dir.checkpoints(name)
        checkpoint_dir = self.loaded.recipe.checkpoint.checkpoint_dir
        if checkpoint_dir:
            root = (self.site.cwd / Path(checkpoint_dir).expanduser()).resolve()
            folder = root / self.run_dir.root.name / name
        return [*self._common_arguments(), "--checkpoints", str(folder)]

    def _point_arguments(self, point: SweepPoint) -> list[str]:
        data = ["--data", str(self.data)] if self.data else []
        return [*data, *_override_arguments(point)]

    # --- resources

    def _needs(self, stage: str, resources: StageResources, cpus: int, gpus: int = 0, tasks: int = 1) -> Needs:
        """Return the resources of a stage's elements; ``cpus`` applies if neither recipe nor site sets them."""
        default = self.site.defaults.get(stage, StageResources())
        return Needs(
            nodes=resources.nodes or 1,
            gpus_per_node=gpus,
            tasks_per_node=tasks,
            cpus=resources.cpus or default.cpus or cpus,
            mem=resources.mem or default.mem,
            time_minutes=resources.time or default.time,
            hang_seconds=60.0 * (resources.hang_minutes or DEFAULT_HANG_MINUTES),
        )

    def _train_needs(self) -> Needs:
        """Return the resources for training. Raises BadInput if they do not fit the machine, batch or model."""
        resources, site = self.loaded.recipe.resources.train, self.site
        nodes = resources.nodes or 1
        if nodes > site.nodes and not site.cluster:
            raise BadInput(
                f"{self.loaded.path}: resources.train.nodes is {nodes}, but amlaunch local uses only {site.nodes}; "
                f"add --resources.train.nodes {site.nodes}"
            )
        gpus = self._train_gpus(nodes)
        default_tasks = 1 if resources.gpus_per_node else resources.tasks_per_node or 1
        tasks = gpus or default_tasks
        # Too many nodes or GPUs for a cluster are reported by amlaunch.launcher.checks.slurm_limits.
        if nodes <= site.nodes and gpus <= site.gpus:
            self._check_ranks(nodes * tasks)
        return self._needs("train", resources, self._train_cpus(gpus, tasks), gpus, tasks)

    def _check_ranks(self, ranks: int) -> None:
        """Raise BadInput if a sweep point cannot be trained on so many ranks."""
        for point in self.loaded.elements():
            recipe = recipe_at_point(self.loaded, point) if point else self.loaded.recipe
            problem = check_ranks(recipe, ranks)
            if problem:
                raise BadInput(": ".join(part for part in (str(self.loaded.path), _title(point), problem) if part))

    def _train_cpus(self, gpus: int, tasks: int) -> int:
        """Return the default CPUs per node: all of this machine; on a cluster the same share as of the node's GPUs."""
        site = self.site
        if not site.cluster:
            return site.cpus
        if not gpus or not site.gpus:
            return tasks
        return max(tasks, site.cpus * min(gpus, site.gpus) // site.gpus)

    def _train_gpus(self, nodes: int) -> int:
        """Return the GPUs per node: ``--gpus``, else the recipe's, else as many as are available and divide the batch.

        Raises BadInput for more GPUs than this machine has.
        """
        site, requested = self.site, self.site.requested_gpus
        if requested is not None:
            if requested < 0:
                raise BadInput(f"--gpus {requested}: expected an integer of at least 0 (0 trains on the CPU)")
            if requested > site.gpus and not site.cluster:
                available = counted(site.gpus, "GPU")
                raise BadInput(f"--gpus {requested}: this machine has {available}; to train on the CPU, write --gpus 0")
            return requested

        recipe_gpus = self.loaded.recipe.resources.train.gpus_per_node
        if site.cluster and recipe_gpus is not None and recipe_gpus > site.gpus:
            return recipe_gpus
        limit = site.gpus if recipe_gpus is None else min(recipe_gpus, site.gpus)
        for gpus in range(limit, 0, -1):
            if check_batch(self.loaded.recipe, nodes * gpus) is None:
                return gpus
        return 0


def _title(point: SweepPoint) -> str:
    return " ".join(_override_arguments(point))


def _override_arguments(point: SweepPoint) -> list[str]:
    """Return a sweep point as overrides. JSON is YAML: a string keeps its quotes, so it stays a string."""
    return [f"--{key}={json.dumps(value, ensure_ascii=False)}" for key, value in point.items()]
