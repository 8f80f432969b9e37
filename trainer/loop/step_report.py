"""A step's numbers, checked and written down once they have come from the device."""

from __future__ import annotations

import math

from amlaunch.trainer.loop.checkpointing import last_good
from amlaunch.trainer.loop.training_state import Job
from amlaunch.trainer.metrics.writers import StepLine
from amlaunch.trainer.process.errors import TrainingFailed


def settle(job: Job) -> None:
    """Read all numbers that are still on their way: nothing unread is ever saved."""
    while job.pending:
        report(job)


def report(job: Job) -> None:
    """Check and write down the oldest step that is not; its loss and norm are the same on all ranks, so all stop together."""
    taken = job.pending.pop(0)
    loss, norm = taken.numbers.wait()
    job.watch.beat(f"after step {taken.step}")
    spent = job.clock.lap()
    if job.metrics:
        tokens = job.batches.step_tokens
        job.metrics.step(
            StepLine(
                step=taken.step,
                epoch=job.batches.epoch(taken.step),
                tokens=taken.step * tokens,
                loss=loss,
                grad_norm=norm,
                lr=taken.lr,
                step_tokens=tokens,
                epochs=job.batches.epochs(taken.step),
                **{f"{part}_time_s": seconds for part, seconds in spent.items()},
            )
        )
    if math.isfinite(loss) and math.isfinite(norm):
        job.last_loss, job.skipped = loss, 0
        return
    job.skipped += 1
    if job.skipped >= job.recipe.step_scheduler.max_skipped_steps:
        raise TrainingFailed(
            f"step {taken.step}: the loss is {loss}, the gradient norm {norm}, {job.skipped} steps in a row; {last_good(job)}"
        )
