"""The training loop: what a step does, in order, and what happens between steps."""

from __future__ import annotations

import hashlib

import torch

from amlaunch.recipes.errors import RESUMABLE
from amlaunch.trainer.data.batches import Batch
from amlaunch.trainer.loop.checkpointing import collect, finish, save
from amlaunch.trainer.loop.forward_backward import forward_backward
from amlaunch.trainer.loop.step_report import report, settle
from amlaunch.trainer.loop.training_state import Job, Pending
from amlaunch.trainer.loop.validation import validate, validate_if_missed
from amlaunch.trainer.metrics.readback import Readback
from amlaunch.trainer.optim import optimizers
from amlaunch.trainer.parallel.world import dropout_rank
from amlaunch.trainer.process.garbage_collection import StepGarbageCollector


def train(job: Job) -> int:
    """Take the steps that are left. Returns OK, or RESUMABLE when asked to stop, everything saved.

    Raises TrainingFailed after ``max_skipped_steps`` steps in a row whose loss or gradient is not a number.
    """
    collector = StepGarbageCollector()
    collector.freeze()
    try:
        return take_steps(job, collector)
    finally:
        collector.restore()


def take_steps(job: Job, collector: StepGarbageCollector) -> int:
    """:func:`train`, while ``collector`` holds the garbage collector."""
    if not validate_if_missed(job):
        return leave(job)
    while job.step < job.last_step:
        batch = next_batch(job)
        if batch is None:
            return leave(job)
        job.pending.append(take_step(job, batch))
        while len(job.pending) > (
            1 if job.world.device.type == "cuda" else 0
        ):  # read late: the GPU is never waited for
            report(job)
        validate_now = job.due(job.recipe.step_scheduler.val_every_steps) and len(job.validation) > 0
        save_now = job.due(job.recipe.step_scheduler.ckpt_every_steps)
        if validate_now or save_now:
            settle(job)
        if validate_now and not validate(job):
            return leave(job)
        if save_now:
            save(job)
        collect(job)
        collector.step(job.taken)
    return finish(job)


def next_batch(job: Job) -> Batch | None:
    """This rank's part of the next step; None, on all ranks, where any of them was asked to stop."""
    job.watch.at(f"waiting for the data of step {job.step + 1}")
    with job.clock.part("data"):
        batch = job.batches.next(lambda: job.stop.requested(poll=True))
    job.watch.at(f"waiting for the other ranks before step {job.step + 1}", others=True)
    return None if job.world.any(batch is None or job.stop.requested()) else batch


def take_step(job: Job, batch: Batch) -> Pending:
    """One optimizer step on a global batch; it changes nothing where loss or gradient are not numbers."""
    job.step += 1
    job.taken += 1
    job.profiler.step(job.step)
    seed_step(job.recipe.seed, job.step, dropout_rank(job.recipe.distributed, job.world))
    job.model.train()
    loss = forward_backward(job, batch)
    norm = optimizers.clip(job.model.parameters(), job.recipe.clip_grad_norm).to(loss.device)
    rate = job.schedule.rate(job.step)
    job.optimizers.set_rate(rate)
    job.optimizers.step(torch.isfinite(loss) & torch.isfinite(norm))
    job.optimizers.zero_grad()
    return Pending(job.step, Readback(torch.stack((loss.double(), norm.double()))), rate)


def leave(job: Job) -> int:
    """Save the step that was just taken, all ranks the same one."""
    settle(job)
    save(job)
    finish(job)
    if job.world.is_main and job.saver is None:
        print(f"stopped after step {job.step}; nothing is saved, for checkpoint.enabled is false", flush=True)
    if job.world.is_main and job.skipped and job.saver is not None:
        print(
            f"stopped after step {job.step}, not saved: the last {job.skipped} steps were no numbers; it goes on from step {job.saver.saved}",
            flush=True,
        )
    return RESUMABLE


def seed_step(seed: int, step: int, rank: int) -> None:
    """Make dropout a function of seed, step and rank: a resumed run draws what the undisturbed one did."""
    digest = hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
