"""What a training run consists of, for the loop and those who help it."""

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
from amlaunch.trainer.metrics.step_timer import Clock
from amlaunch.trainer.metrics.writers import Metrics
from amlaunch.trainer.optim.optimizers import Optimizers, Schedule
from amlaunch.trainer.parallel.world import World
from amlaunch.trainer.process.hang_watch import HangWatch
from amlaunch.trainer.process.stop_request import StopFlag


@dataclass(frozen=True)
class Pending:
    """A step whose numbers are on their way from the device."""

    step: int
    numbers: Readback
    """Loss and gradient norm."""
    lr: float


@dataclass
class Job:
    """Everything that a training run consists of."""

    recipe: Recipe
    world: World
    model: torch.nn.Module
    loss_fn: Any
    optimizers: Optimizers
    schedule: Schedule
    batches: StepBatches
    validation: Mapping[str, ValidationBatches]
    """By name; the first set's loss says which checkpoint is the best. Empty where nothing is validated."""
    identity: Identity
    saver: Saver | None
    """None where the recipe wants no checkpoints."""
    metrics: Metrics | None
    """On rank 0 only."""
    stop: StopFlag
    watch: HangWatch
    profiler: Profiler
    last_step: int
    step: int = 0
    """Steps taken since the beginning of the run."""
    taken: int = 0
    """Steps taken since this start."""
    last_loss: float | None = None
    """The newest that is a number."""
    validated: tuple[int, float] = (-1, math.nan)
    """The step of the newest validation, and its loss."""
    skipped: int = 0
    """Of the newest steps, how many in a row changed nothing."""
    clock: Clock = field(default_factory=Clock)
    pending: list[Pending] = field(default_factory=list)
    """Steps that were taken, and not yet written down."""

    def due(self, every: int | None) -> bool:
        """Whether something that happens every so many steps, and after the last one, happens now."""
        return self.step == self.last_step or (every is not None and self.step % every == 0)
