"""From a batch to its loss and gradients, over all ranks and micro-batches."""

from __future__ import annotations

import torch

from amlaunch.trainer.data.batches import Batch
from amlaunch.trainer.loop.training_state import Job
from amlaunch.trainer.loss import IGNORE_INDEX, compute_loss
from amlaunch.trainer.parallel.world import autocast, micro_step, unwrap


def forward_backward(job: Job, batch: Batch) -> torch.Tensor:
    """Gradients of the mean loss over all labels of the global batch; returns that mean, on all ranks.

    The count is of all ranks and micro-batches together, so that masked labels
    weigh the same wherever they fall. FSDP2 and DDP average over the ranks,
    which the factor ``world.averaged`` undoes. Each rank has the labels that no
    other has, with tensor and context parallelism, too.
    """
    batch = batch.local_to(job.world)
    count = (
        job.world.sum((batch.labels != IGNORE_INDEX).sum()).clamp(min=1).double()
    )  # one over an integer would be float32
    parts = batch.split(job.recipe.step_scheduler.local_batch_size)
    total = torch.zeros((), dtype=torch.float64, device=job.world.device)
    for i, part in enumerate(parts):
        with micro_step(job.model, last=i == len(parts) - 1):
            loss = batch_loss(job, part)
            (loss * (job.world.gradient_average_size / count)).backward()
        total += loss.detach()
        job.watch.beat(f"in step {job.step}", steady=job.taken > 1)
    return job.world.sum(total) / count


def batch_loss(job: Job, batch: Batch) -> torch.Tensor:
    """Sum of the losses of a micro-batch's labels."""
    with autocast(job.recipe.distributed, job.world):
        return compute_loss(
            job.model, unwrap(job.model), job.loss_fn, batch.inputs, batch.labels, **batch.forward_kwargs
        )
