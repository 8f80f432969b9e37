"""How long training stands still for a checkpoint of GPT-2 124M with AdamW's state, and how long saving and loading take.

Usage: python benchmarks/checkpoint.py [ROUNDS] [FOLDER]

One rank. Each round saves once as training does (a copy in memory, then a
thread), once while training waits, and once with torch's own ``async_save``,
which neither hashes nor renames; then the newest is verified and loaded. Between
saves the weights change, as in training. FOLDER is where the checkpoints go, and
decides the writing speed.
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


def main() -> None:
    """Print the medians, and their ratios."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    root = Path(tempfile.mkdtemp(dir=sys.argv[2] if len(sys.argv) > 2 else None))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    world = World(0, 1, torch.device("cpu"), timedelta(minutes=10))
    model = build_gpt2_model(n_positions=1024)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    train_a_little(model, optimizer)
    aside, waiting = (
        Saver(root / name, Checkpoint(is_async=name == "aside"), world, "", nothing) for name in ("aside", "waiting")
    )
    aside.reserve(model, [optimizer])
    time.sleep(5)  # training: the memory is touched meanwhile
    found: dict[str, list[float]] = {
        name: [] for name in ("async stall", "async whole", "sync stall", "torch stall", "verify", "load", "slower")
    }
    alone = work(20)
    for step in range(1, rounds + 1):
        train_a_little(model, optimizer)
        aside.save(step, model, [optimizer], {"loss": 0.0, "model": {}, "data": {}})
        busy = work(20)
        outcome = aside.wait()
        waiting.save(step, model, [optimizer], {"loss": 0.0, "model": {}, "data": {}})
        synced = waiting.wait()
        assert outcome and synced and not outcome.error and not synced.error
        found["async stall"].append(outcome.blocked_seconds)
        found["async whole"].append(outcome.seconds)
        found["sync stall"].append(synced.blocked_seconds)
        found["slower"].append(busy / alone)
        found["torch stall"].append(torchs_own(root / "torch", model, optimizer))
        verify_and_load(root / "aside", world, model, optimizer, found)
        print(f"round {step}: " + ", ".join(f"{name} {values[-1]:.3f}" for name, values in found.items()), flush=True)
    medians = {name: statistics.median(values) for name, values in found.items()}
    size = sum(path.stat().st_size for path in checkpoint.list_checkpoints(root / "aside")[0].rglob("*"))
    print(f"{size / 1e9:.2f} GB; medians: " + ", ".join(f"{name} {value:.3f}" for name, value in medians.items()))
    print(f"training stands still for {medians['async stall'] / medians['sync stall']:.1%} of a synchronous save")
    shutil.rmtree(root)
    exit_process(0)


def nothing(found: checkpoint.StoredCheckpoint, out: Path) -> None:
    """These checkpoints are not consolidated."""


def train_a_little(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """A step with gradients out of nowhere: only the state's size and its change matter."""
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()


def work(times: int) -> float:
    """Seconds for some of what training does most."""
    left = torch.randn(1024, 1024)
    began = time.perf_counter()
    for _ in range(times):
        left @ left
    return time.perf_counter() - began


def torchs_own(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """How long ``dcp.async_save`` keeps its caller."""
    began = time.perf_counter()
    future = dcp.async_save(checkpoint.training_state_dict(model, [optimizer]), checkpoint_id=folder)
    seconds = time.perf_counter() - began
    future.result()
    return seconds


def verify_and_load(
    root: Path, world: World, model: nn.Module, optimizer: torch.optim.Optimizer, found: dict[str, list[float]]
) -> None:
    """Both parts of going on from the newest."""
    began = time.perf_counter()
    newest = checkpoint.newest_intact(checkpoint.list_checkpoints(root), world)
    verified = time.perf_counter()
    assert newest is not None
    checkpoint.load(newest, model, [optimizer])
    found["verify"].append(verified - began)
    found["load"].append(time.perf_counter() - verified)


if __name__ == "__main__":
    main()
