"""State of a training run, shared by the loop and its helper modules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from amlaunch.recipes.format.schema import Recipe
from amlaunch.trainer.checkpoints.checkpoint import Identity
from amlaunch.trainer.checkpoints.saver import Saver
from amlaunch.trainer.data.batches import StepBatches, ValidationBatches
from amlaunch.trainer.metrics.profiling import Profiler
from amlaunch.trainer.metrics.readback import Readback
from amlaunch.trainer.metrics.step_timer import StepTimer
from amlaunch.trainer.metrics.writers import Metrics
from amlaunch.trainer.optim.optimizers import LearningRateSchedule, Optimizers
from amlaunch.trainer.parallel.world import World
from amlaunch.trainer.process.hang_watch import HangWatch
from amlaunch.trainer.process.stop_request import StopFlag


@dataclass(frozen=True)
class PendingStep:
    """A finished step whose numbers are still being copied from the device."""

    step: int
    numbers: Readback
    """Loss and gradient norm."""
    lr: float


@dataclass
class TrainingState:
    """All objects and counters of a training run on this rank."""

    recipe: Recipe
    world: World
    model: torch.nn.Module
    loss_fn: Any
    optimizers: Optimizers
    schedule: LearningRateSchedule
    batches: StepBatches
    validation: Mapping[str, ValidationBatches]
    """Validation sets by name; the loss of the first one selects the best checkpoint. Empty without validation."""
    identity: Identity
    saver: Saver | None
    """None if the recipe disables checkpoints."""
    metrics: Metrics | None
    """Set on rank 0 only."""
    stop: StopFlag
    watch: HangWatch
    profiler: Profiler
    last_step: int
    step: int = 0
    """Steps taken since the beginning of the run."""
    steps_this_start: int = 0
    """Steps taken by this process."""
    last_loss: float | None = None
    """The newest finite training loss."""
    last_validation: tuple[int, float] = (-1, math.nan)
    """Step and loss of the newest validation."""
    skipped_in_a_row: int = 0
    """Number of newest consecutive steps whose update was skipped."""
    timer: StepTimer = field(default_factory=StepTimer)
    pending: list[PendingStep] = field(default_factory=list)
    """Steps taken but not yet reported, oldest first."""

    def is_due(self, every: int | None) -> bool:
        """Return True at every ``every``-th step and at the last step."""
        return self.step == self.last_step or (every is not None and self.step % every == 0)
