"""Loss and gradients of a global batch, over all ranks and micro-batches."""

from __future__ import annotations

import torch

from amlaunch.trainer.data.batches import Batch
from amlaunch.trainer.loop.training_state import TrainingState
from amlaunch.trainer.loss import IGNORE_INDEX, compute_loss
from amlaunch.trainer.parallel.world import autocast, micro_step, unwrap


def forward_backward(state: TrainingState, batch: Batch) -> torch.Tensor:
    """Compute the gradients of the mean loss per label of the global batch; return that mean on all ranks.

    Labels are counted over all ranks and micro-batches, so that masked labels
    weigh the same wherever they are. FSDP2 and DDP average gradients over the
    ranks; the factor ``world.gradient_average_size`` undoes that. Each label belongs to
    exactly one rank, also under tensor and context parallelism.
    """
    batch = batch.local_to(state.world)
    labels = state.world.sum((batch.labels != IGNORE_INDEX).sum())
    # double, because one divided by an integer tensor would be float32
    labels = labels.clamp(min=1).double()

    micro_batches = batch.split(state.recipe.step_scheduler.local_batch_size)
    total = torch.zeros((), dtype=torch.float64, device=state.world.device)
    for i, micro_batch in enumerate(micro_batches):
        with micro_step(state.model, last=i == len(micro_batches) - 1):
            loss = batch_loss(state, micro_batch)
            (loss * (state.world.gradient_average_size / labels)).backward()
        total += loss.detach()
        state.watch.beat(f"running step {state.step}", steady=state.steps_this_start > 1)
    return state.world.sum(total) / labels


def batch_loss(state: TrainingState, batch: Batch) -> torch.Tensor:
    """Return the summed loss of a micro-batch's labels."""
    with autocast(state.recipe.distributed, state.world):
        return compute_loss(
            state.model, unwrap(state.model), state.loss_fn, batch.inputs, batch.labels, **batch.forward_kwargs
        )
