"""Measure how long checkpoints of GPT-2 124M with AdamW state block training, and how long saving and loading take.

Usage: python benchmarks/checkpoint.py [ROUNDS] [FOLDER]

One rank. Each round saves once asynchronously like training (a copy in memory,
then a thread), once synchronously, and once with torch's ``async_save``, which
neither hashes nor renames. Then the newest checkpoint is verified and loaded.
The weights change between saves, as in training. FOLDER holds the checkpoints;
its disk decides the writing speed.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from amlaunch.recipes.format.schema import Checkpoint
from amlaunch.trainer.checkpoints import checkpoint
from amlaunch.trainer.checkpoints.saver import Saver
from amlaunch.trainer.models.gpt2 import build_gpt2_model
from amlaunch.trainer.parallel.world import World
from amlaunch.trainer.process.errors import exit_process

COLUMNS = ("async blocked", "async total", "sync blocked", "torch blocked", "verify", "load", "compute slowdown")
META = {"loss": 0.0, "model": {}, "data": {}}


def main() -> None:
    """Print the medians of all rounds."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    root = Path(tempfile.mkdtemp(dir=sys.argv[2] if len(sys.argv) > 2 else None))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    world = World(0, 1, torch.device("cpu"), timedelta(minutes=10))
    model = build_gpt2_model(n_positions=1024)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    change_weights(model, optimizer)
    async_saver = Saver(root / "async", Checkpoint(is_async=True), world, "", no_consolidation)
    sync_saver = Saver(root / "sync", Checkpoint(is_async=False), world, "", no_consolidation)
    async_saver.reserve(model, [optimizer])
    # a thread touches the memory meanwhile, as it does while training takes its first steps
    time.sleep(5)

    times: dict[str, list[float]] = {column: [] for column in COLUMNS}
    undisturbed = compute(20)
    for step in range(1, rounds + 1):
        change_weights(model, optimizer)
        async_saver.save(step, model, [optimizer], META)
        times["compute slowdown"].append(compute(20) / undisturbed)
        async_outcome = async_saver.wait()
        sync_saver.save(step, model, [optimizer], META)
        sync_outcome = sync_saver.wait()
        assert async_outcome and sync_outcome and not async_outcome.error and not sync_outcome.error
        times["async blocked"].append(async_outcome.blocked_seconds)
        times["async total"].append(async_outcome.seconds)
        times["sync blocked"].append(sync_outcome.blocked_seconds)
        times["torch blocked"].append(torch_async_save(root / "torch", model, optimizer))
        verify_seconds, load_seconds = verify_and_load(root / "async", world, model, optimizer)
        times["verify"].append(verify_seconds)
        times["load"].append(load_seconds)
        print(f"round {step}: " + ", ".join(f"{name} {values[-1]:.3f}" for name, values in times.items()), flush=True)

    medians = {name: statistics.median(values) for name, values in times.items()}
    size = sum(path.stat().st_size for path in checkpoint.list_checkpoints(root / "async")[0].rglob("*"))
    print(f"{size / 1e9:.2f} GB; medians: " + ", ".join(f"{name} {value:.3f}" for name, value in medians.items()))
    share = medians["async blocked"] / medians["sync blocked"]
    print(f"an asynchronous save blocks training for {share:.1%} of the time of a synchronous one")
    shutil.rmtree(root)
    exit_process(0)


def no_consolidation(source: checkpoint.StoredCheckpoint, out: Path) -> None:
    """Do nothing, because these checkpoints are not consolidated."""


def change_weights(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Take a step with constant gradients; only the size of the state and its change matter."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()


def compute(times: int) -> float:
    """Return the seconds of some matrix products, the bulk of training's work."""
    left = torch.randn(1024, 1024)
    started = time.perf_counter()
    for _ in range(times):
        left @ left
    return time.perf_counter() - started


def torch_async_save(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Return the seconds that ``dcp.async_save`` blocks its caller."""
    started = time.perf_counter()
    future = dcp.async_save(checkpoint.training_state_dict(model, [optimizer]), checkpoint_id=folder)
    seconds = time.perf_counter() - started
    future.result()
    return seconds


def verify_and_load(
    root: Path, world: World, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[float, float]:
    """Return the seconds to verify and to load the newest checkpoint."""
    started = time.perf_counter()
    newest = checkpoint.newest_intact(checkpoint.list_checkpoints(root), world)
    verified = time.perf_counter()
    assert newest is not None
    checkpoint.load(newest, model, [optimizer])
    return verified - started, time.perf_counter() - verified


if __name__ == "__main__":
    main()
