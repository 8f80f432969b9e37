"""The training loop: what a step does, in order, and what happens between steps."""

from __future__ import annotations

import gc
import hashlib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from recipes.errors import GO_ON_LATER, OK
from recipes.schema import Recipe
from trainer import checkpoint, optim
from trainer.batches import Batch, StepBatches, ValidationBatches
from trainer.clock import Clock
from trainer.errors import TrainingFailed
from trainer.loss import IGNORED
from trainer.metrics import Metrics, StepLine, number
from trainer.models import logits_of
from trainer.parallel import World, autocast, micro_step, noise_rank
from trainer.profiling import Profiler
from trainer.readback import Readback
from trainer.saving import Outcome, Saver
from trainer.stop import StopFlag
from trainer.watch import Watch


@dataclass
class Job:
    """Everything that a training run consists of."""

    recipe: Recipe
    world: World
    model: torch.nn.Module
    loss_fn: Any
    optimizers: optim.Optimizers
    schedule: optim.Schedule
    batches: StepBatches
    validation: ValidationBatches | None
    identity: checkpoint.Identity
    saver: Saver | None
    """None where the recipe wants no checkpoints."""
    metrics: Metrics | None
    """On rank 0 only."""
    stop: StopFlag
    watch: Watch
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


def train(job: Job) -> int:
    """Take the steps that are left. Returns OK, or GO_ON_LATER when asked to stop, everything saved.

    Raises TrainingFailed after ``max_skipped_steps`` steps in a row whose loss or gradient is not a number.
    """
    clock = Clock()
    pending: list[Pending] = []
    gc.collect()
    gc.freeze()  # what exists now stays: later collections, in the middle of a step, need not look at it
    if not _validate_if_missed(job, clock):
        return _leave(job, pending, clock)
    while job.step < job.last_step:
        job.watch.at(f"waiting for the data of step {job.step + 1}")
        with clock.part("data"):
            batch = job.batches.next(lambda: job.stop.asked(look=True))
        job.watch.at(f"waiting for the other ranks before step {job.step + 1}", others=True)
        if job.world.any(batch is None or job.stop.asked()):
            return _leave(job, pending, clock)
        pending.append(take_step(job, batch))
        while len(pending) > (1 if job.world.device.type == "cuda" else 0):  # read late: the GPU is never waited for
            _report(job, pending.pop(0), clock)
        validate_now = _due(job, job.recipe.step_scheduler.val_every_steps) and job.validation is not None
        save_now = _due(job, job.recipe.step_scheduler.ckpt_every_steps)
        if validate_now or save_now:
            _settle(job, pending, clock)
        if validate_now and not validate(job, clock):
            return _leave(job, pending, clock)
        if save_now:
            _save(job, clock)
        _collect(job)
    return _finish(job, clock)


def _due(job: Job, every: int | None) -> bool:
    return job.step == job.last_step or (every is not None and job.step % every == 0)


@dataclass(frozen=True)
class Pending:
    """A step whose numbers are on their way from the device."""

    step: int
    numbers: Readback
    """Loss and gradient norm."""
    lr: float


def take_step(job: Job, batch: Batch | None) -> Pending:
    """One optimizer step on a global batch; it changes nothing where loss or gradient are not numbers."""
    if batch is None:
        raise RuntimeError("no rank gave up, and yet there is no batch")
    job.step += 1
    job.taken += 1
    job.profiler.step(job.step)
    seed_step(job.recipe.seed, job.step, noise_rank(job.recipe.distributed, job.world))
    job.model.train()
    loss = forward_backward(job, batch)
    norm = optim.clip(job.model.parameters(), job.recipe.clip_grad_norm).to(loss.device)
    rate = job.schedule.rate(job.step)
    job.optimizers.set_rate(rate)
    job.optimizers.step(torch.isfinite(loss) & torch.isfinite(norm))
    job.optimizers.zero_grad()
    return Pending(job.step, Readback(torch.stack((loss.double(), norm.double()))), rate)


def forward_backward(job: Job, batch: Batch) -> torch.Tensor:
    """Gradients of the mean loss over all labels of the global batch; returns that mean, on all ranks.

    The count is of all ranks and micro-batches together, so that masked labels
    weigh the same wherever they fall. FSDP2 and DDP average over the ranks,
    which the factor ``world.averaged`` undoes. Each rank has the labels that no
    other has, with tensor and context parallelism, too.
    """
    batch = batch.part_of(job.world)
    count = job.world.sum((batch.labels != IGNORED).sum()).clamp(min=1).double()  # one over an integer would be float32
    parts = batch.split(job.recipe.step_scheduler.local_batch_size)
    total = torch.zeros((), dtype=torch.float64, device=job.world.device)
    for i, part in enumerate(parts):
        with micro_step(job.model, last=i == len(parts) - 1):
            loss = batch_loss(job, part)
            (loss * (job.world.averaged / count)).backward()
        total += loss.detach()
        job.watch.beat(f"in step {job.step}", steady=job.taken > 1)
    return job.world.sum(total) / count


def batch_loss(job: Job, batch: Batch) -> torch.Tensor:
    """Sum of the losses of a micro-batch's labels."""
    with autocast(job.recipe.distributed, job.world):
        return job.loss_fn(logits_of(job.model(batch.inputs, **batch.more)), batch.labels)


@torch.no_grad()
def validate(job: Job, clock: Clock) -> bool:
    """The mean loss over the validation windows, always the same ones, dropout off.

    False where the run was asked to stop meanwhile: then it is made up for when it goes on.
    """
    if job.validation is None:
        return True
    began = time.perf_counter()
    with clock.part("validation"):
        job.model.eval()
        loss = mean_loss(job, job.validation.batches())
    if loss is None:
        return False
    if not math.isfinite(loss):
        raise TrainingFailed(f"the validation loss after step {job.step} is {loss}; {_last_good(job)}")
    job.validated = (job.step, loss)
    if job.metrics:
        job.metrics.validation(job.step, loss, time.perf_counter() - began)
    return True


def mean_loss(job: Job, batches: Iterable[Batch]) -> float | None:
    """Loss a label over the ``batches`` of all ranks, each with as many; None where any was asked to stop meanwhile."""
    sums = torch.zeros(2, dtype=torch.float64, device=job.world.device)
    for batch in batches:
        if job.world.any(job.stop.asked()):
            return None
        batch = batch.part_of(job.world)
        sums[0] += batch_loss(job, batch)
        sums[1] += (batch.labels != IGNORED).sum()
        job.watch.beat(f"validating after step {job.step}", steady=job.taken > 0)
    loss, count = job.world.sum(sums).tolist()
    return loss / max(count, 1.0)


def _validate_if_missed(job: Job, clock: Clock) -> bool:
    """Validate after the resumed step, where the run was stopped before it came to that; False: stopped again."""
    due = job.step > 0 and job.validation is not None and _due(job, job.recipe.step_scheduler.val_every_steps)
    if due and not job.world.from_main(job.metrics and job.metrics.has_validation(job.step)):
        return validate(job, clock)
    return True


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of seed, step and rank: a resumed run draws what the undisturbed one did."""
    digest = hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def _settle(job: Job, pending: list[Pending], clock: Clock) -> None:
    """Read all numbers that are still on their way: nothing unread is ever saved."""
    while pending:
        _report(job, pending.pop(0), clock)


def _report(job: Job, taken: Pending, clock: Clock) -> None:
    """Check and write down a step; its loss and norm are the same on all ranks, so all stop together."""
    loss, norm = taken.numbers.wait()
    job.watch.beat(f"after step {taken.step}")
    spent = clock.lap()
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
                **{f"{part}_time_s": seconds for part, seconds in spent.items()},
            )
        )
    if math.isfinite(loss) and math.isfinite(norm):
        job.last_loss, job.skipped = loss, 0
        return
    job.skipped += 1
    if job.skipped >= job.recipe.step_scheduler.max_skipped_steps:
        raise TrainingFailed(f"step {taken.step}: the loss is {loss}, the gradient norm {norm}, {job.skipped} steps in a row; {_last_good(job)}")


def _last_good(job: Job) -> str:
    if job.saver is not None:
        _told(job, job.saver.wait())
    if job.saver is None or not job.saver.saved:
        return "no checkpoint was saved before; a lower optimizer.lr or a longer lr_scheduler.lr_warmup_steps may help"
    return (
        f"the last good checkpoint is {checkpoint.folder_of(job.saver.root, job.saver.saved)}; starting again goes on from "
        "there, and a lower optimizer.lr or clip_grad_norm.max_norm may help"
    )


# --- checkpoints ----------------------------------------------------------------------------------


def _save(job: Job, clock: Clock) -> None:
    """Begin to write a checkpoint, unless the newest is already of this step, or the weights may be spoilt."""
    if job.saver is None:
        return
    with clock.part("checkpoint"):
        _told(job, job.saver.wait(lambda: job.watch.beat("a checkpoint is written")))
        if job.step == job.saver.saved or (job.skipped and job.step < job.last_step):
            return
        meta = {
            "tokens": job.step * job.batches.step_tokens,
            "loss": job.last_loss,
            "val_loss": number(job.validated[1]) if job.validated[0] == job.step else None,
            "model": dict(job.identity.model),
            "data": dict(job.identity.data),
        }
        job.saver.save(job.step, job.model, job.optimizers.parts, meta)


def _collect(job: Job) -> None:
    """Hear how the save that was begun last has ended, if it has; reserve memory for the first once its size is known."""
    if job.saver is None:
        return
    if job.taken == 1:
        job.saver.reserve(job.model, job.optimizers.parts)
    _told(job, job.saver.ended())


def _told(job: Job, outcome: Outcome | None) -> None:
    """Say how a save ended. One that failed does not stop the training: the checkpoints before are there."""
    if outcome is None or not job.world.main:
        return
    if outcome.error is not None:
        if outcome.step < job.last_step:  # else it is the run's own end, and said there
            print(f"error: {_not_written(job, outcome)}; training goes on", flush=True)
        return
    if job.metrics:
        job.metrics.checkpoint(outcome.step, outcome.seconds)
    took = f"{outcome.seconds:.1f} s, of which training waited {outcome.waited:.2f} s"
    print(f"step {outcome.step}/{job.last_step} | saved {outcome.folder} in {took}", flush=True)


def _not_written(job: Job, outcome: Outcome) -> str:
    saver = job.saver
    before = f"the one before, of step {saver.saved}, is there" if saver and saver.saved else "there is none before"
    return f"{outcome.folder.parent}: the checkpoint after step {outcome.step} could not be written ({outcome.error}); {before}"


def _finish(job: Job, clock: Clock) -> int:
    """Wait for the last save. Raises TrainingFailed where it could not be written."""
    if job.saver is None:
        return OK
    with clock.part("checkpoint"):
        outcome = job.saver.wait(lambda: job.watch.beat("the last checkpoint is written"))
    last = job.saver.last
    if last is not None and last.error is not None and last.step == job.step:
        raise TrainingFailed(f"{_not_written(job, last)}; once that is put right, the same command goes on from there")
    _told(job, outcome)
    return OK


def _leave(job: Job, pending: list[Pending], clock: Clock) -> int:
    """Save the step that was just taken, all ranks the same one."""
    _settle(job, pending, clock)
    _save(job, clock)
    _finish(job, clock)
    if job.world.main and job.saver is None:
        print(f"stopped after step {job.step}; nothing is saved, for checkpoint.enabled is false", flush=True)
    if job.world.main and job.skipped and job.saver is not None:
        print(f"stopped after step {job.step}, not saved: the last {job.skipped} steps were no numbers; it goes on from step {job.saver.saved}", flush=True)
    return GO_ON_LATER
