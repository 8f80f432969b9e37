"""What our training loop costs beside a minimal one written by hand around the same model.

Usage: python benchmarks/loop.py [PROCESSES] [TURNS]

The model and batch are those of recipes/char.yaml, the smallest that ship: the
smaller a step, the more a loop's own cost counts. In a process the two take
turns of STEPS steps, and who begins changes every turn; compared are the medians
of the turns' ratios. Where in memory a model's weights happen to lie changes the
speed of its kernels by more than a loop costs, so there are several processes,
every other one of which builds the other model first, and what is said is the
median of theirs and how far they lie apart: of the wall clock, and of the
process's own CPU time, which other work on the machine touches less. Ours does
all that it does in a run: metrics and console line each step, heartbeat, stop
flag, agreement of the ranks, skipping of steps that are no numbers, dropout's
seed, a reading thread. The other reads its loss each step, and that is all.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from amlaunch.preprocess.shards.shard_format import HEADER_BYTES, write_shard
from amlaunch.recipes.shipped import find_recipe
from amlaunch.trainer.loop.job import build_model, set_up
from amlaunch.trainer.loop.training_loop import take_steps
from amlaunch.trainer.parallel.world import join_world
from amlaunch.trainer.process.arguments import parse
from amlaunch.trainer.process.errors import exit_process
from amlaunch.trainer.process.garbage_collection import StepGarbageCollector
from amlaunch.trainer.process.hang_watch import HangWatch
from amlaunch.trainer.process.rank_environment import RankEnvironment
from amlaunch.trainer.process.stop_request import StopFlag

VOCAB, BLOCK, BATCH = 105, 64, 12
STEPS = 10


def main() -> None:
    """Print each process's ratios, and their medians."""
    if sys.argv[1:2] == ["--one"]:
        compare(ours_first=sys.argv[2] == "1", turns=int(sys.argv[3]))
    processes, turns = (int(word) for word in (*sys.argv[1:], *("10", "20")[len(sys.argv) - 1 :]))
    found = []
    for number in range(processes):
        words = [sys.executable, __file__, "--one", str(number % 2), str(turns)]
        done = subprocess.run(
            words, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE, text=True
        )
        found.append(json.loads(done.stdout))
        print(
            f"process {number + 1}: a step by hand {found[-1]['ms']:.2f} ms; ours {found[-1]['wall']:+.1%} of the wall clock, {found[-1]['cpu']:+.1%} of CPU time",
            flush=True,
        )
    for key, word in (("wall", "the wall clock"), ("cpu", "CPU time")):
        costs = [one[key] for one in found]
        print(
            f"our loop costs {statistics.median(costs):+.1%} of {word}, median of {processes} processes of {turns} turns of {STEPS} steps (from {min(costs):+.1%} to {max(costs):+.1%})"
        )


def compare(ours_first: bool, turns: int) -> None:
    """One process's ratios, as a line of JSON."""
    torch.set_num_threads(1)
    os.environ["AMLAUNCH_DEVICE"] = "cpu"
    out = os.dup(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as held:
        shard = Path(folder) / "train.bin"
        write_shard(shard, [np.random.default_rng(0).integers(0, VOCAB, 2_000_000).astype("<u2")], np.dtype("<u2"))
        os.chdir(folder)
        make = {"ours": lambda: our_loop(shard, (turns + 1) * STEPS, held), "by hand": lambda: minimal_loop(shard)}
        loops = {name: make[name]() for name in sorted(make, reverse=ours_first)}
        ratios, steps = [], []
        for turn in range(turns + 1):
            spent = {name: timed(loops[name]) for name in sorted(loops, reverse=turn % 2 == 0)}
            if turn:  # before, caches fill and memory is touched
                ratios.append([mine / theirs for mine, theirs in zip(spent["ours"], spent["by hand"], strict=True)])
                steps.append(spent["by hand"][0] / STEPS)
        wall, cpu = (statistics.median(column) - 1 for column in zip(*ratios, strict=True))
        os.write(out, json.dumps({"wall": wall, "cpu": cpu, "ms": statistics.median(steps) * 1e3}).encode())
        exit_process(0)  # as a run does: the process group is never taken down


def timed(loop: Callable[[int], None]) -> tuple[float, float]:
    """Wall clock and CPU time of a turn."""
    wall, own = time.perf_counter(), time.process_time()
    loop(STEPS)
    return time.perf_counter() - wall, time.process_time() - own


def our_loop(shard: Path, last: int, held: contextlib.ExitStack) -> Callable[[int], None]:
    """A job of the recipe char, and its loop for the next so many steps."""
    words = [
        "--dataset.file_pattern",
        str(shard),
        "--step_scheduler.max_steps",
        str(last),
        "--validation_dataset",
        "null",
    ]
    words += ["--checkpoint.enabled", "false", "--export", "null", "--lr_scheduler", "null"]
    options = parse("loop", "", [str(find_recipe("char")), *words])
    silent = held.enter_context(open(os.devnull, "w"))
    with contextlib.redirect_stdout(silent):
        watch = held.enter_context(HangWatch(0, 600.0, 600.0))
        collector = StepGarbageCollector()
        held.callback(collector.restore)
        collector.freeze()  # once a run, and so not a step's cost
        job = set_up(options, StopFlag(), join_world(options.loaded.recipe.distributed, RankEnvironment()), watch, held)

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
