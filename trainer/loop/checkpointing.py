"""The loop's side of checkpointing: start a save, report its outcome, and finish the last one."""

from __future__ import annotations

from amlaunch.recipes.errors import OK
from amlaunch.trainer.checkpoints.checkpoint import checkpoint_folder
from amlaunch.trainer.checkpoints.saver import SaveOutcome
from amlaunch.trainer.loop.training_state import TrainingState
from amlaunch.trainer.metrics.writers import finite_or_none
from amlaunch.trainer.process.errors import TrainingFailed


def start_save(state: TrainingState) -> None:
    """Start writing a checkpoint of the current step.

    Does nothing if this step is already saved, or if the newest steps were
    skipped, because the weights may be damaged then.
    """
    if state.saver is None:
        return
    with state.timer.measure("checkpoint"):
        _report_outcome(state, state.saver.wait(lambda: state.watch.beat("writing a checkpoint")))
        is_saved = state.step == state.saver.saved_step
        if is_saved or (state.skipped_in_a_row and state.step < state.last_step):
            return
        validated_step, val_loss = state.last_validation
        meta = {
            "tokens": state.step * state.batches.step_tokens,
            "loss": state.last_loss,
            "val_loss": finite_or_none(val_loss) if validated_step == state.step else None,
            "model": dict(state.identity.model),
            "data": dict(state.identity.data),
        }
        state.saver.save(state.step, state.model, state.optimizers.members, meta)


def poll_save(state: TrainingState) -> None:
    """Report the save in progress if it has ended; after the first step, reserve memory for the first save."""
    if state.saver is None:
        return
    if state.steps_this_start == 1:
        state.saver.reserve(state.model, state.optimizers.members)
    _report_outcome(state, state.saver.poll())


def finish_saving(state: TrainingState) -> int:
    """Wait for the last save and return the exit code OK. Raises TrainingFailed if it could not be written."""
    if state.saver is None:
        return OK
    with state.timer.measure("checkpoint"):
        outcome = state.saver.wait(lambda: state.watch.beat("writing the last checkpoint"))
    last = state.saver.last_outcome
    if last is not None and last.error is not None and last.step == state.step:
        raise TrainingFailed(f"{_save_error(state, last)}. Fix the cause, then run the same command again to resume")
    _report_outcome(state, outcome)
    return OK


def recovery_advice(state: TrainingState) -> str:
    """Name the last good checkpoint and the next command, for the error that ends a run."""
    if state.saver is not None:
        _report_outcome(state, state.saver.wait())
    if state.saver is None or not state.saver.saved_step:
        return "no checkpoint was saved. Try a lower optimizer.lr or a longer lr_scheduler.lr_warmup_steps"
    folder = checkpoint_folder(state.saver.root, state.saver.saved_step)
    return (
        f"the last good checkpoint is {folder}. Run the same command again to resume from it; "
        "a lower optimizer.lr or clip_grad_norm.max_norm may help"
    )


def _report_outcome(state: TrainingState, outcome: SaveOutcome | None) -> None:
    """Print how a save ended. A failed save does not stop training, because earlier checkpoints are intact."""
    if outcome is None or not state.world.is_main:
        return
    if outcome.error is not None:
        # after the last step, finish_saving raises this error instead
        if outcome.step < state.last_step:
            print(f"error: {_save_error(state, outcome)}; training continues", flush=True)
        return
    if state.metrics:
        state.metrics.checkpoint_saved(outcome.step, outcome.seconds)
    duration = f"{outcome.seconds:.1f} s ({outcome.blocked_seconds:.2f} s of it blocked training)"
    print(f"step {outcome.step}/{state.last_step} | saved {outcome.folder} in {duration}", flush=True)


def _save_error(state: TrainingState, outcome: SaveOutcome) -> str:
    saved_step = state.saver.saved_step if state.saver else 0
    previous = f"the checkpoint of step {saved_step} is intact" if saved_step else "there is no earlier checkpoint"
    return f"{outcome.folder.parent}: cannot write the checkpoint of step {outcome.step} ({outcome.error}); {previous}"
