"""The plan of a run: stages, array elements, dependencies, resources. Plain data, stored as ``plan.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amlaunch.recipes.errors import BadInput

RENAMED_MODULES = {
    "preprocess": "amlaunch.preprocess",
    "trainer": "amlaunch.trainer",
    "trainer.export": "amlaunch.trainer.tools.export",
    "trainer.gpucheck": "amlaunch.trainer.tools.gpu_check",
}
"""Modules of an element in plans that amlaunch wrote before it was one package."""


@dataclass(frozen=True)
class Needs:
    """The resources of one element of a stage."""

    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus: int
    """Per node."""
    mem: str | None = None
    """Per node."""
    time_minutes: int | None = None
    hang_seconds: float | None = None
    """Ranks that show no sign of life for longer are ended as hanging; None: never."""


@dataclass(frozen=True)
class Element:
    """One array element: a Python module and its arguments, run once on every task."""

    name: str
    module: str
    arguments: list[str]
    title: str = ""
    """The difference from the other elements of the stage: a sweep point, or a part of the source."""


@dataclass(frozen=True)
class StageContainer:
    """The container of a stage, as its jobs use it."""

    image: str
    """A reference for :func:`amlaunch.containers.images.reference.parse`; paths are absolute."""
    runtime: str
    """``auto``: each node uses its own, which is not known at submission."""
    mounts: list[tuple[str, str, bool]] = dataclasses.field(default_factory=list)
    """``(source, target, read only)``, besides the mounts that every stage of a run needs."""
    workdir: str | None = None
    entrypoint: bool = False
    options: list[str] = dataclasses.field(default_factory=list)
    """Further arguments of the runtime, from the profile."""
    runtime_env: list[str] = dataclasses.field(default_factory=list)
    """Variables of the host that the runtime itself can see, from the profile."""
    passed: list[str] = dataclasses.field(default_factory=list)
    """Variables that the recipe names (``${NAME}``) and that the processes inside look up."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Known properties of the image: ``architecture``, ``cuda``."""


@dataclass(frozen=True)
class Stage:
    """Elements that can run side by side, once all stages of ``after`` are done."""

    name: str
    elements: list[Element]
    after: list[str]
    needs: Needs
    partition: str | None = None
    """The Slurm partition; None: Slurm's default."""
    container: StageContainer | None = None
    """None: the stage runs in the environment that submits."""
    elementwise: bool = False
    """True if each element needs only the element of the same name in the one stage of ``after``."""


@dataclass(frozen=True)
class Plan:
    """The plan of a complete run."""

    run_id: str
    stages: list[Stage]
    data: str | None
    """The folder of the shards that the preprocess stage writes."""
    cwd: str
    """The folder from which relative paths in the recipe start."""
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    """The environment from the recipe's container section."""
    cluster: dict[str, Any] | None = None
    """The ``name`` of the cluster and its ``profile``; None for a run on this machine."""
    shared: str | None = None
    """``data`` if its name identifies its content, so that runs share it and the stages that write it."""

    def stage(self, name: str) -> Stage:
        """Return a stage by its name. Raises BadInput with the names of all stages."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise BadInput(f"{self.run_id} has no stage {name!r}; its stages: {names}")

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``plan.json``."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Plan:
        """Build a plan from ``plan.json``. Raises KeyError, TypeError or ValueError if it is damaged."""
        return Plan(
            value["run_id"],
            [_stage_from_json(stage) for stage in value["stages"]],
            value["data"],
            value["cwd"],
            value.get("env", {}),
            value.get("cluster"),
            value.get("shared"),
        )


def _stage_from_json(value: Mapping[str, Any]) -> Stage:
    return Stage(
        value["name"],
        [_element_from_json(element) for element in value["elements"]],
        value["after"],
        Needs(**value["needs"]),
        value.get("partition"),
        stage_container_from_json(value.get("container")),
        value.get("elementwise", False),
    )


def _element_from_json(value: Mapping[str, Any]) -> Element:
    element = Element(**value)
    return dataclasses.replace(element, module=RENAMED_MODULES.get(element.module, element.module))


def stage_container_from_json(value: Mapping[str, Any] | None) -> StageContainer | None:
    """Build a stage's container from stored data; None without one."""
    if not value:
        return None
    return StageContainer(**{**value, "mounts": [tuple(mount) for mount in value.get("mounts", ())]})
