"""Compare the cost of our training loop with a minimal hand-written one around the same model.

Usage: python benchmarks/loop.py [PROCESSES] [TURNS]

Model and batch are those of recipes/char.yaml, the smallest shipped recipe: the
shorter a step, the more the loop's own cost matters. Within a process the two
loops take turns of STEPS steps, in alternating order, and the medians of the
turns' ratios are compared. The addresses of a model's weights change the speed
of its kernels by more than a loop costs. So there are several processes, every
other one builds the other model first, and the result is the median over the
processes and their range. It is given for the wall clock, and for the process's
own CPU time, which other work on the machine affects less. Our loop does
everything that it does in a run: metrics and a console line for each step,
heartbeat, stop flag, agreement of the ranks, skipping of non-finite steps,
dropout seeds, and a reader thread. The other one only reads its loss each step.
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
    """Print the ratios of each process, and their medians."""
    if sys.argv[1:2] == ["--one"]:
        compare(ours_first=sys.argv[2] == "1", turns=int(sys.argv[3]))
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    turns = int(sys.argv[2]) if len(sys.argv) > 2 else 20
    reports = []
    for number in range(processes):
        argv = [sys.executable, __file__, "--one", str(number % 2), str(turns)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        child = subprocess.run(argv, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        report = json.loads(child.stdout)
        reports.append(report)
        print(
            f"process {number + 1}: {report['ms']:.2f} ms per step by hand; "
            f"ours {report['wall']:+.1%} wall time, {report['cpu']:+.1%} CPU time",
            flush=True,
        )
    for key, label in (("wall", "wall time"), ("cpu", "CPU time")):
        costs = [report[key] for report in reports]
        print(
            f"our loop: {statistics.median(costs):+.1%} {label} (median of {processes} processes of {turns} "
            f"turns of {STEPS} steps; {min(costs):+.1%} to {max(costs):+.1%})"
        )


def compare(ours_first: bool, turns: int) -> None:
    """Print this process's ratios as JSON, and exit."""
    torch.set_num_threads(1)
    os.environ["AMLAUNCH_DEVICE"] = "cpu"
    stdout = os.dup(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as cleanup:
        shard = Path(folder) / "train.bin"
        write_shard(shard, [np.random.default_rng(0).integers(0, VOCAB, 2_000_000).astype("<u2")], np.dtype("<u2"))
        os.chdir(folder)
        builders = {
            "ours": lambda: our_loop(shard, (turns + 1) * STEPS, cleanup),
            "by hand": lambda: minimal_loop(shard),
        }
        loops = {name: builders[name]() for name in sorted(builders, reverse=ours_first)}
        ratios, seconds = [], []
        for turn in range(turns + 1):
            times = {name: timed(loops[name]) for name in sorted(loops, reverse=turn % 2 == 0)}
            # the first turn fills caches and touches memory
            if turn:
                ratios.append([ours / by_hand for ours, by_hand in zip(times["ours"], times["by hand"], strict=True)])
                seconds.append(times["by hand"][0] / STEPS)
        wall, cpu = (statistics.median(column) - 1 for column in zip(*ratios, strict=True))
        os.write(stdout, json.dumps({"wall": wall, "cpu": cpu, "ms": statistics.median(seconds) * 1e3}).encode())
        # like a run, which never destroys its process group
        exit_process(0)


def timed(loop: Callable[[int], None]) -> tuple[float, float]:
    """Return wall time and CPU time of a turn in seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    loop(STEPS)
    return time.perf_counter() - wall, time.process_time() - cpu


def our_loop(shard: Path, last_step: int, cleanup: contextlib.ExitStack) -> Callable[[int], None]:
    """Set up the recipe char and return a function that takes a number of steps."""
    overrides = {
        "dataset.file_pattern": str(shard),
        "step_scheduler.max_steps": str(last_step),
        "validation_dataset": "null",
        "checkpoint.enabled": "false",
        "export": "null",
        "lr_scheduler": "null",
    }
    options = parse("loop", "", [str(find_recipe("char")), *(f"--{key}={value}" for key, value in overrides.items())])
    devnull = cleanup.enter_context(open(os.devnull, "w"))
    with contextlib.redirect_stdout(devnull):
        watch = cleanup.enter_context(HangWatch(0, 600.0, 600.0))
        collector = StepGarbageCollector()
        cleanup.callback(collector.restore)
        # happens once per run, so it is not part of a step's cost
        collector.freeze()
        world = join_world(options.loaded.recipe.distributed, RankEnvironment())
        state = set_up(options, StopFlag(), world, watch, cleanup)

    def run(steps: int) -> None:
        state.last_step = state.step + steps
        with contextlib.redirect_stdout(devnull):
            take_steps(state, collector)

    return run


def minimal_loop(shard: Path) -> Callable[[int], None]:
    """Build the same model, optimizer and batch, and return a function that takes a number of steps."""
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
    """Yield inputs and labels at random offsets, as nanoGPT does."""
    data = np.memmap(shard, dtype="<u2", mode="r", offset=HEADER_BYTES)
    while True:
        offsets = torch.randint(len(data) - BLOCK, (BATCH,)).tolist()
        rows = torch.from_numpy(np.stack([data[i : i + BLOCK + 1] for i in offsets]).astype(np.int64))
        yield rows[:, :-1], rows[:, 1:]


if __name__ == "__main__":
    main()
