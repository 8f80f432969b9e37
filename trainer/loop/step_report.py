"""Check and log the numbers of finished steps."""

from __future__ import annotations

import math

from amlaunch.trainer.loop.checkpointing import recovery_advice
from amlaunch.trainer.loop.training_state import TrainingState
from amlaunch.trainer.metrics.writers import StepRecord
from amlaunch.trainer.process.errors import TrainingFailed


def report_all_steps(state: TrainingState) -> None:
    """Read and report every pending step, so that unchecked weights are never saved."""
    while state.pending:
        report_oldest_step(state)


def report_oldest_step(state: TrainingState) -> None:
    """Check and log the oldest pending step.

    Raises TrainingFailed after ``max_skipped_steps`` non-finite steps in a row.
    Loss and gradient norm are the same on all ranks, so all ranks raise together.
    """
    pending = state.pending.pop(0)
    loss, norm = pending.numbers.wait()
    state.watch.beat(f"training after step {pending.step}")
    seconds_by_activity = state.timer.lap()

    if state.metrics:
        step_tokens = state.batches.step_tokens
        state.metrics.log_step(
            StepRecord(
                step=pending.step,
                epoch=state.batches.epoch(pending.step),
                tokens=pending.step * step_tokens,
                loss=loss,
                grad_norm=norm,
                lr=pending.lr,
                step_tokens=step_tokens,
                epochs=state.batches.epochs(pending.step),
                **{f"{activity}_time_s": seconds for activity, seconds in seconds_by_activity.items()},
            )
        )

    if math.isfinite(loss) and math.isfinite(norm):
        state.last_loss, state.skipped_in_a_row = loss, 0
        return
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row >= state.recipe.step_scheduler.max_skipped_steps:
        raise TrainingFailed(
            f"step {pending.step}: the loss is {loss} and the gradient norm is {norm}; "
            f"{state.skipped_in_a_row} steps in a row were skipped; {recovery_advice(state)}"
        )
