"""The loss on text that is not trained on."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import torch

from amlaunch.trainer.data.batches import Batch
from amlaunch.trainer.loop.checkpointing import last_good
from amlaunch.trainer.loop.forward_backward import batch_loss
from amlaunch.trainer.loop.training_state import Job
from amlaunch.trainer.loss import IGNORE_INDEX
from amlaunch.trainer.process.errors import TrainingFailed


def validate(job: Job) -> bool:
    """The mean loss over each set's samples, always the same ones, dropout off; the first set's is the one that counts.

    False where the run was asked to stop meanwhile: then it is made up for when it goes on.
    """
    losses: dict[str, float] = {}
    began = time.perf_counter()
    with job.clock.part("validation"):
        job.model.eval()
        for name, batches in job.validation.items():
            loss = mean_loss(job, batches.batches())
            if loss is None:
                return False
            if not math.isfinite(loss):
                what = f"validation loss of {name}" if name else "validation loss"
                raise TrainingFailed(f"the {what} after step {job.step} is {loss}; {last_good(job)}")
            losses[name] = loss
    job.validated = (job.step, next(iter(losses.values())))
    if job.saver is not None:
        job.saver.validated(*job.validated)  # before it is written down: who is killed between the two does both again
    if job.metrics:
        job.metrics.validation(job.step, losses, time.perf_counter() - began)
    return True


@torch.no_grad()
def mean_loss(job: Job, batches: Iterable[Batch]) -> float | None:
    """Loss a label over the ``batches`` of all ranks, each with as many; None where any was asked to stop meanwhile."""
    sums = torch.zeros(2, dtype=torch.float64, device=job.world.device)
    for batch in batches:
        if job.world.any(job.stop.requested()):
            return None
        batch = batch.local_to(job.world)
        sums[0] += batch_loss(job, batch)
        sums[1] += (batch.labels != IGNORE_INDEX).sum()
        job.watch.beat(f"validating after step {job.step}", steady=job.taken > 0)
    loss, count = job.world.sum(sums).tolist()
    return loss / max(count, 1.0)


def validate_if_missed(job: Job) -> bool:
    """Validate after the resumed step, where the run was stopped before it came to that; False: stopped again."""
    due = job.step > 0 and len(job.validation) > 0 and job.due(job.recipe.step_scheduler.val_every_steps)
    if due and not job.world.broadcast(job.metrics and job.metrics.has_validation(job.step)):
        return validate(job)
    return True
