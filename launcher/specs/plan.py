"""What a run consists of: stages, array elements, dependencies, resources. Plain data, as ``plan.json`` stores it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amlaunch.recipes.errors import BadInput


@dataclass(frozen=True)
class Needs:
    """What one element of a stage is given."""

    nodes: int
    gpus_per_node: int
    tasks_per_node: int
    cpus: int
    mem: str | None = None
    time_minutes: int | None = None
    hang_seconds: float | None = None
    """Silence for longer than this means that the ranks hang; None: they are never suspected."""


@dataclass(frozen=True)
class Element:
    """One array element: a Python module and its arguments, run once on every task."""

    name: str
    module: str
    arguments: list[str]
    title: str = ""
    """What sets it apart from its siblings: a point of the sweep, a part of the source."""


@dataclass(frozen=True)
class StageContainer:
    """The container of a stage, as its jobs go by it."""

    image: str
    """Of which :func:`containers.parse` makes a reference again; a path is absolute."""
    runtime: str
    """auto: the node's own, which was not known when it was submitted."""
    mounts: list[tuple[str, str, bool]] = dataclasses.field(default_factory=list)
    """``(source, target, read only)``, beside what every stage of a run needs."""
    workdir: str | None = None
    entrypoint: bool = False
    options: list[str] = dataclasses.field(default_factory=list)
    """Further arguments of the runtime, as the profile says."""
    runtime_env: list[str] = dataclasses.field(default_factory=list)
    """Variables of the host that the runtime itself is left with, as the profile says."""
    passed: list[str] = dataclasses.field(default_factory=list)
    """Variables that the recipe names (``${NAME}``), which the processes inside look up."""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What is known of the image: ``architecture``, ``cuda``."""


@dataclass(frozen=True)
class Stage:
    """Elements that may run side by side, after all of ``after`` are done."""

    name: str
    elements: list[Element]
    after: list[str]
    needs: Needs
    partition: str | None = None
    """On a cluster: where it is queued; None is Slurm's default."""
    container: StageContainer | None = None
    """None: the environment that submits."""


@dataclass(frozen=True)
class Plan:
    """A whole run, as it is carried out and as ``plan.json`` stores it."""

    run_id: str
    stages: list[Stage]
    data: str | None
    """Folder of the shards that the preprocess stage makes."""
    cwd: str
    """Relative paths in the recipe start here."""
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    """Of the recipe's container section."""
    cluster: dict[str, Any] | None = None
    """Where it is submitted: the ``name`` of a cluster and its ``profile``; None on this machine."""
    shared: str | None = None
    """``data``, where its name says what it is made of, so that runs share it and the stages that make it."""

    def stage(self, name: str) -> Stage:
        """The stage called ``name``; BadInput names those there are."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise BadInput(f"{self.run_id} has no stage {name!r}; it has {', '.join(s.name for s in self.stages)}")

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``plan.json``."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Plan:
        """The inverse of :meth:`to_json`."""
        stages = [
            Stage(
                s["name"],
                [Element(**e) for e in s["elements"]],
                s["after"],
                Needs(**s["needs"]),
                s.get("partition"),
                stage_container_from_json(s.get("container")),
            )
            for s in value["stages"]
        ]
        return Plan(
            value["run_id"],
            stages,
            value["data"],
            value["cwd"],
            value.get("env", {}),
            value.get("cluster"),
            value.get("shared"),
        )


def stage_container_from_json(value: Mapping[str, Any] | None) -> StageContainer | None:
    """The container that was stored."""
    return StageContainer(**{**value, "mounts": [tuple(mount) for mount in value.get("mounts", ())]}) if value else None
