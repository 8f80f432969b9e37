"""Stop requests and hangs at awkward moments: during validation, while waiting for data."""

from __future__ import annotations

import functools
import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer_runs import make, on_cpu, same_bits
from trainer_runs import SEQ_LEN, Run, recipe

from amlaunch.launcher.execution.rank_wait import first_failed_rank
from amlaunch.launcher.runs.failure_causes import cause_of
from amlaunch.recipes.errors import FAILED, HANG, OK, RESUMABLE
from amlaunch.trainer.checkpoints import checkpoint
from amlaunch.trainer.process.hang_watch import hang_limits

__all__ = ["on_cpu"]  # an autouse fixture
BLOCKING = """
import os
import time
from pathlib import Path
from amlaunch.trainer.data.datasets import NanogptDataset

class Blocking(NanogptDataset):
    '''Blocks reading while a file `block` exists, on the rank that the file names.'''

    def batch(self, windows):
        block = Path("block")
        while block.exists() and block.read_text() == os.environ.get("RANK"):
            time.sleep(0.02)
        return super().batch(windows)
"""


def blocking(folder: Path, name: str, **sections: Any) -> Run:
    tree = recipe(folder, **sections)
    tree["dataset"] = {
        "_target_": "blocking.py:Blocking",
        "file_pattern": str(folder / "a.bin"),
        "seq_len": SEQ_LEN,
        "shuffle_files": True,
    }
    run = Run(folder / name, tree)
    (run.folder / "blocking.py").write_text(BLOCKING)
    return run


def slow_last_words() -> None:
    """Slow down what rank 0 does after the last step."""
    from amlaunch.trainer.metrics.writers import Metrics

    real = Metrics.close

    def slow(metrics: Metrics) -> None:
        time.sleep(2)
        real(metrics)

    Metrics.close = slow  # type: ignore[method-assign]


def test_no_rank_leaves_before_rank_0_has_finished_its_metrics(tmp_path: Path) -> None:
    run = make(tmp_path, step_scheduler={"max_steps": 2}, validation_dataset=None)
    run.start(2, prepare={0: slow_last_words})
    first, second = run.processes
    while second.poll() is None:
        time.sleep(0.02)
    first.wait(timeout=1.5)
    assert [first.returncode, second.returncode] == [OK, OK]


def slow_validation() -> None:
    """Slow validation down so that it can be interrupted."""
    from amlaunch.trainer.loop import validation

    real = validation.batch_loss

    def slow(job: validation.TrainingState, batch: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            print("validating", flush=True)
            time.sleep(0.2)
        return real(job, batch)

    validation.batch_loss = slow


@pytest.mark.slow
def test_asked_in_a_validation_all_ranks_save_the_same_step_and_make_up_for_it(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "model": {"dropout": 0.2},
        "step_scheduler": {"max_steps": 6, "val_every_steps": 3, "val_batches": 5},
    }
    straight, stopped = make(tmp_path, "straight", **sections), make(tmp_path, "stopped", **sections)
    straight.train(2)
    stopped.start(2, prepare={0: slow_validation, 1: slow_validation})
    wait_for(lambda: "validating" in stopped.processes[1].log.read_text())
    stopped.processes[1].send_signal(signal.SIGUSR1)
    codes, output = stopped.wait(20)
    assert codes == [RESUMABLE] * 2, output
    assert stopped.column("val_loss") == [] and checkpoint.select_checkpoint(stopped.checkpoints).step == 3
    assert checkpoint.list_by_validation_loss(stopped.checkpoints) == []
    stopped.train(2)
    same_bits(straight, stopped)
    third, sixth = stopped.column("val_loss")
    order = [3, 6] if third < sixth else [6, 3]
    assert [
        checkpoint.step_of(folder) for folder in checkpoint.list_by_validation_loss(stopped.checkpoints)
    ] == order, "made up for, it counts"


@pytest.mark.slow
def test_asked_while_one_rank_waits_for_data_all_save_the_same_step(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "step_scheduler": {"max_steps": 200, "val_every_steps": None},
        "dataloader": {"prefetch_factor": 1},
    }
    run = blocking(tmp_path, "run", **sections)
    run.start(2)
    run.until_step(3)
    (run.folder / "block").write_text("1")
    wait_for(lambda: stands_still(run))
    (run.folder / "stop").touch()
    codes, output = run.wait(20)
    assert codes == [RESUMABLE] * 2, output
    assert checkpoint.select_checkpoint(run.checkpoints).step == run.column("step")[-1] < 200
    (run.folder / "stop").unlink()
    (run.folder / "block").unlink()
    last = str(int(run.column("step")[-1]) + 2)
    straight = blocking(tmp_path, "straight", **sections)
    for other in (run, straight):
        other.train(2, "--step_scheduler.max_steps", last, "--lr_scheduler.lr_decay_steps", "200")
    same_bits(straight, run)


@pytest.mark.slow
def test_a_rank_that_hangs_says_where_and_ends_the_job(tmp_path: Path) -> None:
    run = blocking(
        tmp_path, "run", step_scheduler={"max_steps": 10**6, "val_every_steps": None}, distributed={"hang_seconds": 2}
    )
    run.start(2)
    run.until_step(3)
    (run.folder / "block").write_text("1")
    codes, output = run.wait(30)
    assert codes[1] == HANG and codes[0] in (HANG, FAILED), output
    log = run.processes[1].log.read_text()
    assert "error: rank 1 on " in log and "hangs: no progress for 2 s while waiting for the data of step " in log
    assert first_failed_rank(codes) == 1
    assert 'blocking.py", line 13 in batch' in log, "the stack of the thread that reads"
    cause = cause_of(log)
    assert cause is not None and (cause.kind, cause.restart, cause.avoid_host) == ("hang", True, True)
    (run.folder / "block").unlink()
    assert run.train_inline("--step_scheduler.max_steps", "2") == OK


def test_the_watch_is_earlier_than_collectives_and_the_driver() -> None:
    assert hang_limits(timeout_minutes=10, hang_minutes=None, hang_seconds=None) == (540.0, 1620.0)
    assert hang_limits(timeout_minutes=math.inf, hang_minutes=None, hang_seconds=None) == (1620.0, 1620.0)
    assert hang_limits(timeout_minutes=60, hang_minutes=10, hang_seconds=None) == (540.0, 540.0)
    assert hang_limits(timeout_minutes=10, hang_minutes=None, hang_seconds=30) == (30.0, 1620.0)


def wait_for(condition: functools.partial[bool] | Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stands_still(run: Run) -> bool:
    before = len(run.lines())
    time.sleep(0.7)
    return len(run.lines()) == before
