"""What our training loop costs beside a minimal one written by hand around the same model.

Usage: OMP_NUM_THREADS=1 python benchmarks/loop.py [ROUNDS] [STEPS]

The model and batch are those of recipes/char.yaml, the smallest that ship: the
smaller a step, the more a loop's own cost counts. The loops take turns, STEPS
steps each, and who begins changes every round; compared are the medians of the
rounds' ratios, of the wall clock and of this process's own CPU time, which other
work on the machine touches less. Ours does all that it does in a run: metrics
and console line each step, heartbeat, stop flag, agreement of the ranks, skipping
of steps that are no numbers, dropout's seed, a reading thread. The other reads
its loss each step, and that is all.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from preprocess.shards import HEADER_BYTES, write_shard
from recipes.shipped import find_recipe
from trainer.cli import parse
from trainer.collector import Collector
from trainer.errors import leave
from trainer.job import build_model, prepare
from trainer.loop import take_steps
from trainer.parallel import join
from trainer.ranks import Ranks
from trainer.stop import StopFlag
from trainer.watch import Watch

VOCAB, BLOCK, BATCH = 105, 64, 12


def main() -> None:
    """Print the medians."""
    rounds, steps = (int(word) for word in (*sys.argv[1:], *("9", "30")[len(sys.argv) - 1 :]))
    torch.set_num_threads(1)
    os.environ["AMLAUNCH_DEVICE"] = "cpu"
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as held:
        shard = Path(folder) / "train.bin"
        write_shard(shard, [np.random.default_rng(0).integers(0, VOCAB, 2_000_000).astype("<u2")], np.dtype("<u2"))
        os.chdir(folder)
        ours, by_hand = our_loop(shard, (rounds + 1) * steps, held), minimal_loop(shard)
        ratios: list[list[float]] = [[], []]
        for number in range(rounds + 1):
            order = (ours, by_hand) if number % 2 else (by_hand, ours)
            spent = {loop: timed(loop, steps) for loop in order}
            if number == 0:
                continue  # caches fill, memory is touched
            for found, mine, theirs in zip(ratios, spent[ours], spent[by_hand], strict=True):
                found.append(mine / theirs)
            print(f"round {number}: a step of ours {spent[ours][0] / steps * 1e3:.2f} ms, by hand {spent[by_hand][0] / steps * 1e3:.2f} ms", flush=True)
        wall, own = (statistics.median(found) - 1 for found in ratios)
        print(f"our loop costs {wall:+.1%} of the wall clock, {own:+.1%} of CPU time (medians of {rounds} rounds of {steps} steps)", flush=True)
        leave(0)  # as a run does: the process group is never taken down


def timed(loop: Callable[[int], None], steps: int) -> tuple[float, float]:
    """Wall clock and CPU time of so many steps."""
    wall, own = time.perf_counter(), time.process_time()
    loop(steps)
    return time.perf_counter() - wall, time.process_time() - own


def our_loop(shard: Path, last: int, held: contextlib.ExitStack) -> Callable[[int], None]:
    """A job of the recipe char, and its loop for the next so many steps."""
    words = ["--dataset.file_pattern", str(shard), "--step_scheduler.max_steps", str(last), "--validation_dataset", "null"]
    words += ["--checkpoint.enabled", "false", "--export", "null", "--lr_scheduler", "null"]
    options = parse("loop", "", [str(find_recipe("char")), *words])
    silent = held.enter_context(open(os.devnull, "w"))
    with contextlib.redirect_stdout(silent):
        watch = held.enter_context(Watch(0, 600.0, 600.0))
        collector = Collector()
        held.callback(collector.release)
        collector.hold()  # once a run, and so not a step's cost
        job = prepare(options, StopFlag(), join(options.loaded.recipe.distributed, Ranks()), watch, held)

    def run(steps: int) -> None:
        job.last_step = job.step + steps
        with contextlib.redirect_stdout(silent):
            take_steps(job, collector)

    return run


def minimal_loop(shard: Path) -> Callable[[int], None]:
    """The same model, optimizer and batch in as few lines as they take."""
    options = parse("loop", "", [str(find_recipe("char"))])
    model = build_model(options.loaded.recipe, options.loaded.policy).train()
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    batches = random_batches(shard)

    def run(steps: int) -> None:
        for _ in range(steps):
            x, y = next(batches)
            loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()

    return run


def random_batches(shard: Path) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Windows at random places, as nanoGPT takes them."""
    data = np.memmap(shard, dtype="<u2", mode="r", offset=HEADER_BYTES)
    while True:
        places = torch.randint(len(data) - BLOCK, (BATCH,)).tolist()
        rows = torch.from_numpy(np.stack([data[i : i + BLOCK + 1] for i in places]).astype(np.int64))
        yield rows[:, :-1], rows[:, 1:]


if __name__ == "__main__":
    main()
