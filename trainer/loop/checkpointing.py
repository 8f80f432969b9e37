"""The loop's side of checkpointing: start a save, report its outcome, and finish the last one."""

from __future__ import annotations

from amlaunch.recipes.errors import OK, BadInput
from amlaunch.trainer.checkpoints.checkpoint import checkpoint_folder
from amlaunch.trainer.checkpoints.saver import SaveOutcome
from amlaunch.trainer.loop.training_state import TrainingState
from amlaunch.trainer.metrics.writers import finite_or_none
from amlaunch.trainer.process.errors import TrainingFailed


def start_save(state: TrainingState) -> None:
    """Start writing a checkpoint of the current step.

    Does nothing if this step is already saved, or if the newest steps were
    skipped, because the weights may be damaged then. Raises BadInput on all
    ranks if the save before failed for a reason that this one would share.
    """
    if state.saver is None:
        return
    with state.timer.measure("checkpoint"):
        _report_outcome(state, state.saver.wait(lambda: state.watch.beat("writing a checkpoint")))
        _check_last_save(state)
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


def saves_fail(state: TrainingState) -> bool:
    """Return True if this rank knows that every later save will fail, too; then :func:`start_save` ends the run."""
    last = state.saver.last_outcome if state.saver is not None else None
    return last is not None and last.recurs


def finish_saving(state: TrainingState) -> int:
    """Wait for the last save and return the exit code OK.

    Raises TrainingFailed if it could not be written, and BadInput if no later one could be.
    """
    if state.saver is None:
        return OK
    with state.timer.measure("checkpoint"):
        outcome = state.saver.wait(lambda: state.watch.beat("writing the last checkpoint"))
    _check_last_save(state)
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


def _check_last_save(state: TrainingState) -> None:
    """Raise BadInput on all ranks if a rank's newest save, which has ended, failed for a reason that will recur."""
    last = state.saver.last_outcome if state.saver is not None else None
    error = _save_error(state, last) if last is not None and last.recurs else None
    errors = [error for error in state.world.all_gather(error) if error]
    if errors:
        raise BadInput(
            f"{errors[0]}; every later save would fail for the same reason, so the run ends. Fix the cause, or set "
            "checkpoint.model_save_format: torch_save and checkpoint.save_consolidated: false, then run the same "
            "command again to resume"
        )


def _report_outcome(state: TrainingState, outcome: SaveOutcome | None) -> None:
    """Print how a save ended. A failure that may pass does not stop training: earlier checkpoints are intact."""
    if outcome is None or not state.world.is_main:
        return
    # start_save or finish_saving raises all other errors
    if outcome.error is not None and not outcome.recurs and outcome.step < state.last_step:
        print(f"warning: {_save_error(state, outcome)}; training continues", flush=True)
    if not outcome.is_saved:
        return
    if state.metrics:
        state.metrics.checkpoint_saved(outcome.step, outcome.seconds)
    duration = f"{outcome.seconds:.1f} s ({outcome.blocked_seconds:.2f} s of it blocked training)"
    print(f"step {outcome.step}/{state.last_step} | saved {outcome.folder} in {duration}", flush=True)


def _save_error(state: TrainingState, outcome: SaveOutcome) -> str:
    root, error = outcome.folder.parent, outcome.error
    if outcome.is_saved:
        return (
            f"{root}: step {outcome.step} is saved, but not its consolidated folder ({error}); "
            "amlaunch export can write the same files"
        )
    saved_step = state.saver.saved_step if state.saver else 0
    previous = f"the checkpoint of step {saved_step} is intact" if saved_step else "there is no earlier checkpoint"
    return f"{root}: cannot write the checkpoint of step {outcome.step} ({error}); {previous}"
