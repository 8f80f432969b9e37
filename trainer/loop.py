"""The training loop: what a step does, in order, and what happens between steps."""

from __future__ import annotations

import gc
import hashlib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recipes.errors import GO_ON_LATER, OK
from recipes.schema import Recipe
from trainer import checkpoint, optim
from trainer.batches import Batch, StepBatches, ValidationBatches
from trainer.errors import TrainingFailed
from trainer.loss import IGNORED
from trainer.metrics import Metrics, StepLine
from trainer.models import logits_of
from trainer.parallel import World, autocast, micro_step
from trainer.readback import Readback
from trainer.stop import StopFlag


@dataclass
class Job:
    """Everything that a training run consists of."""

    recipe: Recipe
    world: World
    model: torch.nn.Module
    loss_fn: Any
    optimizer: torch.optim.Optimizer
    schedule: optim.Schedule
    batches: StepBatches
    validation: ValidationBatches | None
    identity: checkpoint.Identity
    checkpoints: Path
    metrics: Metrics | None
    """On rank 0 only."""
    stop: StopFlag
    last_step: int
    step: int = 0
    """Steps taken."""
    saved_step: int = 0
    """Steps in the newest checkpoint."""
    last_loss: float | None = None


def train(job: Job) -> int:
    """Take the steps that are left. Returns OK, or GO_ON_LATER when asked to stop, everything saved.

    Raises TrainingFailed at the first loss or gradient that is not a number.
    """
    clock = Clock()
    pending: list[Pending] = []
    gc.collect()
    gc.freeze()  # what exists now stays: later collections, in the middle of a step, need not look at it
    _validate_if_missed(job)
    while job.step < job.last_step:
        if job.world.any(job.stop.asked()):
            _settle(job, pending, clock)
            _save(job)
            if job.world.main and not job.recipe.checkpoint.enabled:
                print(f"stopped after step {job.step}; nothing is saved, for checkpoint.enabled is false", flush=True)
            return GO_ON_LATER
        pending.append(take_step(job))
        while len(pending) > (1 if job.world.device.type == "cuda" else 0):  # read late: the GPU is never waited for
            _report(job, pending.pop(0), clock)
        validate_now = _due(job, job.recipe.step_scheduler.val_every_steps) and job.validation is not None
        save_now = _due(job, job.recipe.step_scheduler.ckpt_every_steps)
        if validate_now or save_now:
            _settle(job, pending, clock)
        if validate_now:
            validate(job)
        if save_now:
            _save(job)
        if validate_now or save_now:
            clock.restart()  # their time is not the next step's
    return OK


def _due(job: Job, every: int | None) -> bool:
    return job.step == job.last_step or (every is not None and job.step % every == 0)


@dataclass(frozen=True)
class Pending:
    """A step whose numbers are on their way from the device."""

    step: int
    numbers: Readback
    """Loss and gradient norm."""
    lr: float
    data_time_s: float


def take_step(job: Job) -> Pending:
    """One optimizer step on the next global batch."""
    waited = time.perf_counter()
    batch = job.batches.next()
    data_time = time.perf_counter() - waited
    job.step += 1
    seed_step(job.recipe.seed, job.step, job.world.rank)
    job.model.train()
    loss = forward_backward(job, batch)
    norm = optim.clip(job.model.parameters(), job.recipe.clip_grad_norm)
    rate = job.schedule.rate(job.step)
    optim.set_rate(job.optimizer, rate)
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    return Pending(job.step, Readback(torch.stack((loss.double(), norm.double()))), rate, data_time)


def forward_backward(job: Job, batch: Batch) -> torch.Tensor:
    """Gradients of the mean loss over all labels of the global batch; returns that mean, on all ranks.

    The count is of all ranks and micro-batches together, so that masked labels
    weigh the same wherever they fall. FSDP2 and DDP average over the ranks,
    which the factor ``world.size`` undoes.
    """
    count = job.world.sum((batch.labels != IGNORED).sum()).clamp(min=1).double()  # one over an integer would be float32
    parts = batch.split(job.recipe.step_scheduler.local_batch_size)
    total = torch.zeros((), dtype=torch.float64, device=job.world.device)
    for i, part in enumerate(parts):
        with micro_step(job.model, last=i == len(parts) - 1):
            loss = batch_loss(job, part)
            (loss * (job.world.size / count)).backward()
        total += loss.detach()
    return job.world.sum(total) / count


def batch_loss(job: Job, batch: Batch) -> torch.Tensor:
    """Sum of the losses of a micro-batch's labels."""
    with autocast(job.recipe.distributed, job.world):
        return job.loss_fn(logits_of(job.model(batch.inputs)), batch.labels)


@torch.no_grad()
def validate(job: Job) -> None:
    """The mean loss over the validation windows, always the same ones, dropout off."""
    if job.validation is None:
        return
    job.model.eval()
    loss = mean_loss(job, job.validation.batches())
    if not math.isfinite(loss):
        raise TrainingFailed(f"the validation loss after step {job.step} is {loss}; {_last_good(job)}")
    if job.metrics:
        job.metrics.validation(job.step, loss)


def mean_loss(job: Job, batches: Iterable[Batch]) -> float:
    """Loss a label over the ``batches`` of all ranks; every rank must come with as many."""
    sums = torch.zeros(2, dtype=torch.float64, device=job.world.device)
    for batch in batches:
        sums[0] += batch_loss(job, batch)
        sums[1] += (batch.labels != IGNORED).sum()
    loss, count = job.world.sum(sums).tolist()
    return loss / max(count, 1.0)


def _validate_if_missed(job: Job) -> None:
    """Validate after the resumed step, where the run was stopped before it came to that."""
    due = job.step > 0 and job.validation is not None and _due(job, job.recipe.step_scheduler.val_every_steps)
    if due and not job.world.from_main(job.metrics and job.metrics.has_validation(job.step)):
        validate(job)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of seed, step and rank: a resumed run draws what the undisturbed one did."""
    digest = hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


class Clock:
    """Time between steps, validation and checkpoints left out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """The next step begins now."""
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or restart."""
        before, self._since = self._since, time.perf_counter()
        return self._since - before


def _settle(job: Job, pending: list[Pending], clock: Clock) -> None:
    """Read all numbers that are still on their way: nothing unread is ever saved."""
    while pending:
        _report(job, pending.pop(0), clock)


def _report(job: Job, taken: Pending, clock: Clock) -> None:
    """Check and write down a step; its loss and norm are the same on all ranks, so all stop together."""
    loss, norm = taken.numbers.wait()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise TrainingFailed(f"step {taken.step}: the loss is {loss}, the gradient norm {norm}; {_last_good(job)}")
    job.last_loss = loss
    if job.metrics:
        tokens, windows = job.batches.step_tokens, job.batches.order.size
        job.metrics.step(
            StepLine(
                step=taken.step,
                epoch=taken.step * job.batches.global_batch / windows,
                tokens=taken.step * tokens,
                loss=loss,
                grad_norm=norm,
                lr=taken.lr,
                step_tokens=tokens,
                step_time_s=clock.lap(),
                data_time_s=taken.data_time_s,
            )
        )


def _last_good(job: Job) -> str:
    if not job.saved_step:
        return "no checkpoint was saved before; a lower optimizer.lr or a longer lr_scheduler.lr_warmup_steps may help"
    return (
        f"the last good checkpoint is {checkpoint.folder_of(job.checkpoints, job.saved_step)}; starting again goes on from "
        "there, and a lower optimizer.lr or clip_grad_norm.max_norm may help"
    )


def _save(job: Job) -> None:
    """Write a checkpoint, unless the newest is already of this step."""
    if not job.recipe.checkpoint.enabled or job.step == job.saved_step:
        return
    began = time.perf_counter()
    meta = {
        "tokens": job.step * job.batches.step_tokens,
        "loss": job.last_loss,
        "model": dict(job.identity.model),
        "data": dict(job.identity.data),
    }
    keep = job.recipe.checkpoint.max_recent_checkpoints
    folder = checkpoint.save(job.checkpoints, job.step, job.model, job.optimizer, meta, job.world, keep)
    job.saved_step = job.step
    if job.metrics:
        job.metrics.checkpoint(job.step)
    if job.world.main:
        print(f"step {job.step}/{job.last_step} | saved {folder} in {time.perf_counter() - began:.1f} s", flush=True)
