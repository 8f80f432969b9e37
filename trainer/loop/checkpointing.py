"""The loop's part in checkpoints: when one is begun, how it ended, and leaving with everything saved."""

from __future__ import annotations

from amlaunch.recipes.errors import OK
from amlaunch.trainer.checkpoints import checkpoint
from amlaunch.trainer.checkpoints.saver import Outcome
from amlaunch.trainer.loop.training_state import Job
from amlaunch.trainer.metrics.writers import number
from amlaunch.trainer.process.errors import TrainingFailed


def save(job: Job) -> None:
    """Begin to write a checkpoint, unless the newest is already of this step, or the weights may be spoilt."""
    if job.saver is None:
        return
    with job.clock.part("checkpoint"):
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


def collect(job: Job) -> None:
    """Hear how the save that was begun last has ended, if it has; reserve memory for the first once its size is known."""
    if job.saver is None:
        return
    if job.taken == 1:
        job.saver.reserve(job.model, job.optimizers.parts)
    _told(job, job.saver.ended())


def _told(job: Job, outcome: Outcome | None) -> None:
    """Say how a save ended. One that failed does not stop the training: the checkpoints before are there."""
    if outcome is None or not job.world.is_main:
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


def finish(job: Job) -> int:
    """Wait for the last save. Raises TrainingFailed where it could not be written."""
    if job.saver is None:
        return OK
    with job.clock.part("checkpoint"):
        outcome = job.saver.wait(lambda: job.watch.beat("the last checkpoint is written"))
    last = job.saver.last
    if last is not None and last.error is not None and last.step == job.step:
        raise TrainingFailed(f"{_not_written(job, last)}; once that is put right, the same command goes on from there")
    _told(job, outcome)
    return OK


def last_good(job: Job) -> str:
    """What to go back to, and how, for the error that ends a run."""
    if job.saver is not None:
        _told(job, job.saver.wait())
    if job.saver is None or not job.saver.saved:
        return "no checkpoint was saved before; a lower optimizer.lr or a longer lr_scheduler.lr_warmup_steps may help"
    return (
        f"the last good checkpoint is {checkpoint.folder_of(job.saver.root, job.saver.saved)}; starting again goes on from "
        "there, and a lower optimizer.lr or clip_grad_norm.max_norm may help"
    )
