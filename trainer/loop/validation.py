"""Validation loss on held-out text."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import torch

from amlaunch.trainer.data.batches import Batch
from amlaunch.trainer.loop.checkpointing import recovery_advice
from amlaunch.trainer.loop.forward_backward import batch_loss
from amlaunch.trainer.loop.training_state import TrainingState
from amlaunch.trainer.loss import IGNORE_INDEX
from amlaunch.trainer.process.errors import TrainingFailed


def validate(state: TrainingState) -> bool:
    """Compute and log the mean loss of each validation set, always on the same samples and without dropout.

    The loss of the first set selects the best checkpoint. Returns False if a
    stop was requested meanwhile; the resumed run then repeats the validation.
    Raises TrainingFailed if a loss is not finite.
    """
    losses: dict[str, float] = {}
    started = time.perf_counter()
    with state.timer.measure("validation"):
        state.model.eval()
        for name, batches in state.validation.items():
            loss = mean_loss(state, batches.batches())
            if loss is None:
                return False
            if not math.isfinite(loss):
                label = f"validation loss of {name}" if name else "validation loss"
                raise TrainingFailed(f"the {label} after step {state.step} is {loss}; {recovery_advice(state)}")
            losses[name] = loss

    state.last_validation = (state.step, next(iter(losses.values())))
    # the checkpoint first, then the metrics: a run killed between the two repeats both
    if state.saver is not None:
        state.saver.record_validation(*state.last_validation)
    if state.metrics:
        state.metrics.log_validation(state.step, losses, time.perf_counter() - started)
    return True


@torch.no_grad()
def mean_loss(state: TrainingState, batches: Iterable[Batch]) -> float | None:
    """Return the mean loss per label over the ``batches`` of all ranks; None if any rank was asked to stop.

    Every rank must pass the same number of batches.
    """
    loss_and_labels = torch.zeros(2, dtype=torch.float64, device=state.world.device)
    for batch in batches:
        if state.world.any(state.stop.requested()):
            return None
        batch = batch.local_to(state.world)
        loss_and_labels[0] += batch_loss(state, batch)
        loss_and_labels[1] += (batch.labels != IGNORE_INDEX).sum()
        state.watch.beat(f"validating after step {state.step}", steady=state.steps_this_start > 0)
    loss, labels = state.world.sum(loss_and_labels).tolist()
    return loss / max(labels, 1.0)


def validate_if_missed(state: TrainingState) -> bool:
    """Repeat a validation that a stop interrupted before this start; return False if stopped again."""
    every = state.recipe.step_scheduler.val_every_steps
    is_due = state.step > 0 and len(state.validation) > 0 and state.is_due(every)
    if is_due and not state.world.broadcast(state.metrics and state.metrics.has_validation(state.step)):
        return validate(state)
    return True
