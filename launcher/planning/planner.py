"""From a recipe to its plan on a site. Pure: nothing is read, written or started."""

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
from amlaunch.recipes.run_layout import RunDir

HANG_MINUTES = 30
EXPORT_CPUS = 4
"""Of an export on a cluster, which is one process that copies and samples."""


@dataclass(frozen=True)
class Site:
    """What a plan needs to know of the place where it will run."""

    runs: Path
    cwd: Path
    gpus: int
    """GPUs a node."""
    cpus: int
    """CPUs a node."""
    nodes: int = 1
    """Nodes there are."""
    asked_gpus: int | None = None
    """``--gpus``; None: as the recipe says, or what there is."""
    cluster: Mapping[str, Any] | None = None
    """Name and profile of the cluster it is submitted to; None on this machine, whose CPUs an element may have all of."""
    defaults: Mapping[str, StageResources] = field(default_factory=dict)
    """What an element of a stage gets where the recipe does not say."""
    containers: Mapping[str, StageContainer | None] = field(default_factory=dict)
    """In what each stage runs."""
    partitions: Mapping[str, str | None] = field(default_factory=dict)
    """Where each stage is queued."""


def run_id(loaded: LoadedRecipe) -> str:
    """The same recipe is the same run: its name and a fingerprint of what it computes."""
    return f"{loaded.recipe.name}-{loaded.fingerprint()}"


def make_plan(loaded: LoadedRecipe, site: Site, run: str | None = None) -> Plan:
    """The plan of a recipe on a site; ``run``: the id of a run that it goes on with. Raises BadInput where they do not fit."""
    recipe = loaded.recipe
    data = data_folder(loaded, recipe.preprocess, site) if recipe.preprocess else None
    shared = data if recipe.preprocess and not recipe.preprocess.output_dir else None
    run_dir = RunDir(site.runs / (run or run_id(loaded)), shared)
    common = _common_arguments(loaded, run_dir)
    stages = []
    if recipe.preprocess and data:
        stages += _preprocess_stages(recipe.preprocess, common, run_dir, data, site, loaded)
    stages.append(_train_stage(loaded, common, run_dir, data, site, after=["verify"] if data else []))
    if recipe.export:
        stages.append(_export_stage(loaded, common, run_dir, data, site))
    env = (loaded.tree.get("container") or {}).get("env") or {}  # placeholders kept: the driver fills them in
    stages = [
        dataclasses.replace(stage, partition=site.partitions.get(stage.name), container=site.containers.get(stage.name))
        for stage in stages
    ]
    return Plan(
        run_id=run_dir.root.name,
        stages=stages,
        data=str(data) if data else None,
        cwd=str(site.cwd),
        env=env,
        cluster=dict(site.cluster) if site.cluster else None,
        shared=str(shared) if shared else None,
    )


def data_folder(loaded: LoadedRecipe, section: Preprocess, site: Site) -> Path:
    """Where the shards go: as the recipe says, or a folder named by what they are made of, which runs then share."""
    if section.output_dir:
        return (site.cwd / Path(section.output_dir).expanduser()).resolve()
    return site.runs.resolve().parent / "data" / shards_folder_name(section, loaded.data_paths("preprocess"))


def _common_arguments(loaded: LoadedRecipe, run: RunDir) -> list[str]:
    """Arguments that every stage takes: the stored recipe, and what its targets may reach."""
    allowed = [argument for name in loaded.policy.allow for argument in ("--allow-target", name)]
    folder = run.code / "recipe" if file_targets(loaded.tree) else run.root
    return [str(run.recipe_json), "--recipe-dir", str(folder), *allowed]


def _element(stage: str, name: str, module: str, arguments: Sequence[str], run: RunDir, title: str = "") -> Element:
    return Element(name, module, [*arguments, "--element", str(run.element(stage, name).root)], title)


def _preprocess_stages(
    section: Preprocess, common: list[str], run: RunDir, data: Path, site: Site, loaded: LoadedRecipe
) -> list[Stage]:
    resources = loaded.recipe.resources
    workers = section.num_workers or (1 if site.cluster else max(1, site.cpus // section.elements))
    needs = _needs("preprocess", resources.preprocess, site, cpus=workers)
    shared = ["element", *common, "--out", str(data), "--workers", str(section.num_workers or needs.cpus)]
    parts = [
        _element(
            "preprocess",
            str(i),
            "amlaunch.preprocess",
            [*shared, "--index", str(i)],
            run,
            f"part {i + 1} of {section.elements}",
        )
        for i in range(section.elements)
    ]
    check = _element("verify", "0", "amlaunch.preprocess", ["verify", *common, "--out", str(data)], run)
    return [
        Stage("preprocess", parts, [], needs),
        Stage("verify", [check], ["preprocess"], _needs("verify", resources.verify, site, cpus=1)),
    ]


def _train_stage(
    loaded: LoadedRecipe, common: list[str], run: RunDir, data: Path | None, site: Site, after: list[str]
) -> Stage:
    needs = _train_needs(loaded, site)
    elements = []
    for i, point in enumerate(loaded.elements()):
        name = str(i)
        arguments = [
            *common,
            "--checkpoints",
            str(_checkpoints(loaded, run, name, site)),
            "--run-id",
            _element_id(run, name, point),
        ]
        arguments += _data_arguments(data) + _override_arguments(point)
        elements.append(
            _element("train", name, "amlaunch.trainer", arguments, run, " ".join(_override_arguments(point)))
        )
    return Stage("train", elements, after, needs)


def _export_stage(loaded: LoadedRecipe, common: list[str], run: RunDir, data: Path | None, site: Site) -> Stage:
    elements = []
    for i, point in enumerate(loaded.elements()):
        name = str(i)
        arguments = [
            *common,
            "--checkpoints",
            str(_checkpoints(loaded, run, name, site)),
            "--out",
            str(run.export(name)),
        ]
        arguments += _data_arguments(data) + _override_arguments(point)
        elements.append(
            _element(
                "export", name, "amlaunch.trainer.tools.export", arguments, run, " ".join(_override_arguments(point))
            )
        )
    cpus = min(site.cpus, EXPORT_CPUS) if site.cluster else site.cpus
    return Stage("export", elements, ["train"], _needs("export", loaded.recipe.resources.export, site, cpus=cpus))


def _element_id(run: RunDir, name: str, point: Mapping[str, Any]) -> str:
    return f"{run.root.name}-{name}" if point else run.root.name


def _checkpoints(loaded: LoadedRecipe, run: RunDir, name: str, site: Site) -> Path:
    elsewhere = loaded.recipe.checkpoint.checkpoint_dir
    return (
        (site.cwd / Path(elsewhere).expanduser()).resolve() / run.root.name / name
        if elsewhere
        else run.checkpoints(name)
    )


def _data_arguments(data: Path | None) -> list[str]:
    return ["--data", str(data)] if data else []


def _override_arguments(point: Mapping[str, Any]) -> list[str]:
    """JSON is YAML: a string keeps its quotes, so it stays a string."""
    return [f"--{key}={json.dumps(value, ensure_ascii=False)}" for key, value in point.items()]


def _needs(stage: str, given: StageResources, site: Site, cpus: int, gpus: int = 0, tasks: int = 1) -> Needs:
    default = site.defaults.get(stage, StageResources())
    return Needs(
        nodes=given.nodes or 1,
        gpus_per_node=gpus,
        tasks_per_node=tasks,
        cpus=given.cpus or default.cpus or cpus,
        mem=given.mem or default.mem,
        time_minutes=given.time or default.time,
        hang_seconds=60.0 * (given.hang_minutes or HANG_MINUTES),
    )


def _train_needs(loaded: LoadedRecipe, site: Site) -> Needs:
    given = loaded.recipe.resources.train
    nodes = given.nodes or 1
    if nodes > site.nodes and not site.cluster:
        raise BadInput(
            f"{loaded.path}: resources.train.nodes is {nodes}, here there is {site.nodes}; add --resources.train.nodes {site.nodes}"
        )
    gpus = _gpus(loaded, site, nodes)
    tasks = gpus or (1 if given.gpus_per_node else given.tasks_per_node or 1)
    ranks = nodes * tasks
    possible = nodes <= site.nodes and gpus <= site.gpus  # else their number is what is wrong, see _gpus
    for point in loaded.elements() if possible else []:
        recipe = recipe_at_point(loaded, point) if point else loaded.recipe
        wrong = check_ranks(recipe, ranks)
        if wrong:
            raise BadInput(f"{loaded.path}: {' '.join(_override_arguments(point))} {wrong}".replace(":  ", ": "))
    return _needs("train", given, site, cpus=_train_cpus(site, gpus, tasks), gpus=gpus, tasks=tasks)


def _train_cpus(site: Site, gpus: int, tasks: int) -> int:
    """CPUs a node where nobody says: all of this machine; on a cluster, which others use too, as large a part as of its GPUs."""
    if not site.cluster:
        return site.cpus
    return max(tasks, site.cpus * min(gpus, site.gpus) // site.gpus) if gpus and site.gpus else tasks


def _gpus(loaded: LoadedRecipe, site: Site, nodes: int) -> int:
    """GPUs a node for training: as asked, else as the recipe says, else as many as there are and divide the batch.

    More than a node has are an error here, and on a cluster one of those that amlaunch.launcher.checks.slurm_limits tells together.
    """
    if site.asked_gpus is not None:
        if site.asked_gpus < 0:
            raise BadInput(f"--gpus {site.asked_gpus}: a number of GPUs, or 0 for the CPU")
        if site.asked_gpus > site.gpus and not site.cluster:
            raise BadInput(f"--gpus {site.asked_gpus}: this machine has {site.gpus}; --gpus 0 runs on the CPU")
        return site.asked_gpus
    wanted = loaded.recipe.resources.train.gpus_per_node
    if site.cluster and wanted is not None and wanted > site.gpus:
        return wanted
    most = site.gpus if wanted is None else min(wanted, site.gpus)
    fitting = [count for count in range(most, 0, -1) if check_batch(loaded.recipe, nodes * count) is None]
    return fitting[0] if fitting else 0
