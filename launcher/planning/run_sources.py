"""Resolve a start: a new run, a run that is resumed with changes, and a run that is retried unchanged.

The three differ in where recipe, cluster and plan come from. Everything after that is the same for all: see
:mod:`amlaunch.launcher.submission.pipeline`.
"""

from __future__ import annotations

import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar

from amlaunch.launcher.display import advice
from amlaunch.launcher.planning.resolve import load_recipe, plan_run, run_dir_of
from amlaunch.launcher.planning.run_request import RunRequest
from amlaunch.launcher.runs.find import runs_root
from amlaunch.launcher.runs.stored_recipe import command_of, option_values, stored_recipe
from amlaunch.launcher.specs.cluster_profile import Cluster, check_profile, find_cluster
from amlaunch.launcher.specs.plan import Plan, Stage
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.loader import EXECUTION_SECTIONS, LoadedRecipe
from amlaunch.recipes.run_layout import RunDir

IDENTITY_SECTIONS = {
    "preprocess": "the preprocessing",
    "sweep": "the sweep",
    "dataset": "the dataset",
    "model": "the model",
    "name": "the name",
}
"""Sections that identify a run, and how to call them: a run with another one is a new run."""
RESUMED_STAGES = frozenset(("train", "export"))
"""Stages that continue if a run is resumed with other settings, even if they were done."""


class StartKind(Enum):
    """The kind of a start."""

    NEW = "new"
    RESUME = "resume"
    RETRY = "retry"


@dataclass(frozen=True)
class ResolvedRun:
    """A run with its recipe, plan and place, to be checked, written and submitted."""

    kind: StartKind
    run_dir: RunDir
    loaded: LoadedRecipe
    plan: Plan
    stages: Sequence[Stage]
    """The stages to run."""
    cluster: Cluster | None
    """None: this machine."""
    overrides: tuple[str, ...] = ()
    """Settings that the run is resumed with."""
    restarted_stages: frozenset[str] = frozenset()
    """Stages whose done markers are set aside, so that they continue."""


@dataclass(frozen=True)
class RunSource(ABC):
    """The source of a run's recipe, cluster and plan."""

    request: RunRequest

    kind: ClassVar[StartKind]

    @abstractmethod
    def find_cluster(self) -> Cluster | None:
        """Find the cluster to run on; None: this machine. Raises BadInput."""

    @abstractmethod
    def load(self, cluster: Cluster | None) -> tuple[LoadedRecipe, Path]:
        """Load the recipe and name the run directory. Raises BadInput."""

    @abstractmethod
    def plan(self, loaded: LoadedRecipe, root: Path, cluster: Cluster | None) -> Plan:
        """Plan the run. Raises BadInput and, on a cluster, SlurmError."""

    def stage_name(self) -> str | None:
        """Return the only stage to run; None: all."""
        return self.request.stage

    def restarted_stages(self) -> frozenset[str]:
        """Return the stages that run again although they may be done."""
        return frozenset()

    def resolve(self, loaded: LoadedRecipe, root: Path, cluster: Cluster | None) -> ResolvedRun:
        """Plan the run and choose its stages. Raises BadInput and, on a cluster, SlurmError."""
        plan = self.plan(loaded, root, cluster)
        name = self.stage_name()
        stages = [plan.stage(name)] if name else plan.stages
        run_dir, overrides = run_dir_of(root, plan), self.request.overrides
        return ResolvedRun(self.kind, run_dir, loaded, plan, stages, cluster, overrides, self.restarted_stages())


@dataclass(frozen=True)
class NewRun(RunSource):
    """A run from a recipe; if its directory exists, the run continues there."""

    kind = StartKind.NEW

    def find_cluster(self) -> Cluster | None:
        """Find the cluster that was named."""
        return _named_cluster(self.request.cluster)

    def load(self, cluster: Cluster | None) -> tuple[LoadedRecipe, Path]:
        """Load the recipe that was named."""
        runs = runs_root(self.request.runs, cluster.profile.runs if cluster else None)
        return load_recipe(self.request, runs, starting=True)

    def plan(self, loaded: LoadedRecipe, root: Path, cluster: Cluster | None) -> Plan:
        """Make a plan."""
        return plan_run(loaded, root, cluster, self.request.gpus)


@dataclass(frozen=True)
class ExistingRun(RunSource):
    """A run that has a directory; ``--stage`` of its start still applies."""

    run_dir: RunDir
    stored_plan: Plan

    def find_cluster(self) -> Cluster | None:
        """Find the cluster that the run is on, with the profile as it was then."""
        return stored_cluster(self.stored_plan)

    def stage_name(self) -> str | None:
        """Return the only stage that the run was started for; None: all."""
        stages = option_values(command_of(self.run_dir), "--stage")
        return stages[-1] if stages else None

    def load(self, cluster: Cluster | None) -> tuple[LoadedRecipe, Path]:
        """Load the recipe in the run directory, and change to the folder where its relative paths start."""
        for path in self.required_paths():
            if not path.exists():
                command = advice.start_command(self.run_dir)
                raise BadInput(f"{self.run_dir.root.name}: {path} no longer exists; start the run again: {command}")

        # Jobs on a cluster have the values of ${VAR} from the first submit.
        loaded = stored_recipe(self.run_dir, self.request.overrides, job_start=cluster is None)
        os.chdir(self.stored_plan.cwd)
        return loaded, self.run_dir.root

    def required_paths(self) -> list[Path]:
        """Return what must still exist."""
        return [self.run_dir.recipe, Path(self.stored_plan.cwd)]


@dataclass(frozen=True)
class ResumedRun(ExistingRun):
    """An existing run that continues with other settings: its recipe, changed, and a new plan."""

    kind = StartKind.RESUME

    def __post_init__(self) -> None:
        """Raise BadInput for a change that would make it another run."""
        for section in self._changed_sections():
            if section in IDENTITY_SECTIONS:
                command = f"{advice.start_command(self.run_dir)} {shlex.join(self.request.overrides)}"
                raise BadInput(f"resume cannot change {IDENTITY_SECTIONS[section]}. Start a new run: {command}")

    def find_cluster(self) -> Cluster | None:
        """Find the cluster that was named, else the one that the run is on."""
        return _named_cluster(self.request.cluster) if self.request.cluster else super().find_cluster()

    def plan(self, loaded: LoadedRecipe, root: Path, cluster: Cluster | None) -> Plan:
        """Make a new plan; ``--gpus`` of the start still applies unless the run moves to another place."""
        gpus = option_values(command_of(self.run_dir), "--gpus")
        previous = stored_cluster(self.stored_plan)
        keeps_gpus = gpus and (cluster.name if cluster else None) == (previous.name if previous else None)
        return plan_run(loaded, root, cluster, int(gpus[-1]) if keeps_gpus else None)

    def restarted_stages(self) -> frozenset[str]:
        """Return training and export, unless the changes only concern where and how the run executes."""
        changes = self._changed_sections()
        return RESUMED_STAGES if any(section not in EXECUTION_SECTIONS for section in changes) else frozenset()

    def _changed_sections(self) -> list[str]:
        options = [word for word in self.request.overrides if word.startswith("--")]
        return [option[2:].partition("=")[0].split(".")[0] for option in options]


@dataclass(frozen=True)
class RetriedRun(ExistingRun):
    """An existing run, with its recipe and plan unchanged."""

    kind = StartKind.RETRY

    def required_paths(self) -> list[Path]:
        """Return what must still exist: the code snapshot, too."""
        return [*super().required_paths(), self.run_dir.code]

    def plan(self, loaded: LoadedRecipe, root: Path, cluster: Cluster | None) -> Plan:
        """Return the plan in the run directory."""
        return self.stored_plan


def stored_cluster(plan: Plan) -> Cluster | None:
    """Return the cluster that a plan was made for, with its profile as it was then; None: this machine."""
    if plan.cluster is None:
        return None
    tree = plan.cluster.get("profile") or {}
    return Cluster(str(plan.cluster.get("name")), check_profile(tree, {}), "the run's plan.json", tree)


def _named_cluster(name: str | None) -> Cluster | None:
    """Find a cluster by name; None for a profile whose executor is this machine. Raises BadInput."""
    cluster = find_cluster(name) if name else None
    return cluster if cluster and cluster.profile.executor == "slurm" else None
