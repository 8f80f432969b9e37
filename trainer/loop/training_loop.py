"""The training loop: the work of one step, and the work between steps."""

from __future__ import annotations

import hashlib

import torch

from amlaunch.recipes.errors import RESUMABLE
from amlaunch.trainer.data.batches import Batch
from amlaunch.trainer.loop.checkpointing import finish_saving, poll_save, saves_fail, start_save
from amlaunch.trainer.loop.forward_backward import forward_backward
from amlaunch.trainer.loop.step_report import report_all_steps, report_oldest_step
from amlaunch.trainer.loop.training_state import PendingStep, TrainingState
from amlaunch.trainer.loop.validation import validate, validate_if_missed
from amlaunch.trainer.metrics.readback import Readback
from amlaunch.trainer.optim.optimizers import clip_gradients
from amlaunch.trainer.parallel.world import dropout_rank
from amlaunch.trainer.process.garbage_collection import StepGarbageCollector


def train(state: TrainingState) -> int:
    """Take the remaining steps. Returns OK, or RESUMABLE after a stop request, with everything saved.

    Raises TrainingFailed after ``max_skipped_steps`` steps in a row with a non-finite loss or gradient norm.
    """
    collector = StepGarbageCollector()
    collector.freeze()
    try:
        return take_steps(state, collector)
    finally:
        collector.restore()


def take_steps(state: TrainingState, collector: StepGarbageCollector) -> int:
    """Run the loop of :func:`train` while ``collector`` holds the garbage collector."""
    if not validate_if_missed(state):
        return save_and_stop(state)

    # Numbers of a GPU are read one step late, so that the GPU never waits for the host.
    max_pending = 1 if state.world.device.type == "cuda" else 0
    while state.step < state.last_step:
        batch = next_batch(state)
        if batch is None:
            return save_and_stop(state)
        state.pending.append(take_step(state, batch))
        while len(state.pending) > max_pending:
            report_oldest_step(state)

        validate_now = state.is_due(state.recipe.step_scheduler.val_every_steps) and len(state.validation) > 0
        save_now = state.is_due(state.recipe.step_scheduler.ckpt_every_steps)
        if validate_now or save_now:
            report_all_steps(state)
        if validate_now and not validate(state):
            return save_and_stop(state)
        if save_now:
            start_save(state)
        poll_save(state)
        collector.step(state.steps_this_start)
    return finish_saving(state)


def next_batch(state: TrainingState) -> Batch | None:
    """Return this rank's part of the next step; None on all ranks if any of them must stop, or cannot save."""
    next_step = state.step + 1
    state.watch.set_activity(f"waiting for the data of step {next_step}")
    with state.timer.measure("data"):
        batch = state.batches.next(lambda: state.stop.requested(poll=True))
    state.watch.set_activity(f"waiting for the other ranks before step {next_step}", waits_for_ranks=True)
    must_stop = batch is None or state.stop.requested() or saves_fail(state)
    return None if state.world.any(must_stop) else batch


def take_step(state: TrainingState, batch: Batch) -> PendingStep:
    """Take one optimizer step on a global batch; skip the update if the loss or gradient norm is not finite."""
    state.step += 1
    state.steps_this_start += 1
    state.profiler.step(state.step)
    seed_step(state.recipe.seed, state.step, dropout_rank(state.recipe.distributed, state.world))
    state.model.train()

    loss = forward_backward(state, batch)
    norm = clip_gradients(state.model.parameters(), state.recipe.clip_grad_norm).to(loss.device)
    rate = state.schedule.rate(state.step)
    state.optimizers.set_learning_rate(rate)
    state.optimizers.step(torch.isfinite(loss) & torch.isfinite(norm))
    state.optimizers.zero_grad()
    return PendingStep(state.step, Readback(torch.stack((loss.double(), norm.double()))), rate)


def save_and_stop(state: TrainingState) -> int:
    """Save the current step, the same one on all ranks, and return RESUMABLE."""
    report_all_steps(state)
    start_save(state)
    finish_saving(state)
    if state.world.is_main and state.saver is None:
        print(f"stopped after step {state.step}; nothing was saved: checkpoint.enabled is false", flush=True)
    if state.world.is_main and state.saver is not None and state.skipped_in_a_row:
        print(
            f"stopped after step {state.step} without saving it: the last {state.skipped_in_a_row} steps "
            f"had a non-finite loss or gradient norm; training will resume after step {state.saver.saved_step}",
            flush=True,
        )
    return RESUMABLE


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch as a function of seed, step and rank, so that dropout is the same after a resume."""
    digest = hashlib.blake2b(f"{seed}:{step}:{rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
