"""``python -m amlaunch.trainer.tools.gpu_check --out FILE``: what the GPUs of one node do: matrix products, copies, memory, all-reduce.

All ranks measure at once, as in training, where they share the node's power
and cooling. Rank 0 writes the numbers of all as one JSON file. Without CUDA the
same is done on the CPU with small sizes, so that the way there can be tried anywhere.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from amlaunch.recipes.errors import OK
from amlaunch.recipes.files import write_json
from amlaunch.recipes.format.schema import Distributed
from amlaunch.recipes.python_process import die_with_parent
from amlaunch.trainer.parallel.world import World, join_world
from amlaunch.trainer.process.errors import exit_process, run_guarded
from amlaunch.trainer.process.rank_environment import read_rank_environment

JOIN_MINUTES = 3
"""A node whose GPUs do not find each other says so, well before its job's time is over."""


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    side: int
    """Of the square matrices."""
    copy_bytes: int
    reduce_bytes: int
    warmup: int
    rounds: int


ON_GPU = Sizes(side=8192, copy_bytes=4 << 30, reduce_bytes=1 << 30, warmup=50, rounds=50)
ON_CPU = Sizes(side=256, copy_bytes=8 << 20, reduce_bytes=1 << 20, warmup=1, rounds=5)


def main(arguments: Sequence[str]) -> int:
    """Measure on this rank, and return the exit code."""
    die_with_parent()
    parser = argparse.ArgumentParser(
        prog="python -m amlaunch.trainer.tools.gpu_check",
        description="Measure the GPUs of one node, a rank each.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file that rank 0 writes")
    out = parser.parse_args(arguments).out
    return run_guarded(lambda: run(out))


def run(out: Path) -> int:
    """Join the other ranks, measure, and let rank 0 write the numbers to ``out``."""
    world = join_world(Distributed(timeout_minutes=JOIN_MINUTES), read_rank_environment(os.environ))
    sizes = ON_GPU if world.device.type == "cuda" else ON_CPU
    free, total = memory(world.device)
    room = min(world.all_gather(free)) // 8  # one size for all ranks, and for a GPU that others use too
    mine = {
        "rank": world.rank,
        "host": platform.node(),
        **describe(world.device),
        "memory_free_bytes": free,
        "memory_total_bytes": total,
    }
    mine["gemm_tflops"] = gemm(world, sizes)
    mine["copy_gb_s"] = copy(world, sizes, min(sizes.copy_bytes, room))
    print(f"rank {world.rank}: {mine['gemm_tflops']:.4g} TFLOP/s, copies {mine['copy_gb_s']:.4g} GB/s", flush=True)
    reduced = all_reduce(world, sizes, min(sizes.reduce_bytes, room)) if world.size > 1 else None
    ranks = world.all_gather(mine)
    if world.is_main:
        measured = {**software(world.device), "side": sizes.side, "gpus": ranks, "all_reduce": reduced}
        write_json(out, {"outputs": {}, **measured})  # a result names the files that it made
    return OK


def memory(device: torch.device) -> tuple[int, int]:
    """``(free, total)`` bytes of a device before anything of ours is on it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def describe(device: torch.device) -> dict[str, str]:
    """The device's name, and the id by which ``nvidia-smi`` knows it."""
    if device.type != "cuda":
        return {"device": "CPU", "uuid": ""}
    properties = torch.cuda.get_device_properties(device)
    return {"device": str(properties.name), "uuid": str(getattr(properties, "uuid", ""))}


def software(device: torch.device) -> dict[str, Any]:
    """What does the work: versions of torch, CUDA and NCCL; no CUDA device: ``cuda`` is false."""
    cuda = device.type == "cuda"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.distributed.is_nccl_available() else None
    return {"cuda": cuda, "torch": torch.__version__, "cuda_version": torch.version.cuda, "nccl": nccl}


def gemm(world: World, sizes: Sizes, dtype: torch.dtype = torch.bfloat16) -> float:
    """TFLOP/s of a square product, in bfloat16 unless said otherwise; of random numbers, for zeros draw less power and so run faster."""
    left, right = (torch.randn(sizes.side, sizes.side, device=world.device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    seconds = median_seconds(world, sizes, lambda: torch.mm(left, right, out=product))
    return 2 * sizes.side**3 / seconds / 1e12


def copy(world: World, sizes: Sizes, size: int) -> float:
    """GB/s of the device's memory, read and write together, while a large tensor is copied."""
    source = torch.ones(size, device=world.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = median_seconds(world, sizes, lambda: target.copy_(source))
    return 2 * size / seconds / 1e9


def all_reduce(world: World, sizes: Sizes, size: int) -> dict[str, Any]:
    """The bus bandwidth of an all-reduce as nccl-tests count it, of the slowest rank; and whether the sum was right."""
    values = torch.full((max(1, size // 4),), float(world.rank + 1), device=world.device)
    world.sum(values)
    right = bool((values == world.size * (world.size + 1) / 2).all().item())
    values.zero_()  # sums of sums would leave the range of float32
    seconds = max(world.all_gather(median_seconds(world, sizes, lambda: world.sum(values))))
    moved = values.numel() * 4 * 2 * (world.size - 1) / world.size
    return {"bytes": values.numel() * 4, "bus_gb_s": moved / seconds / 1e9, "right": all(world.all_gather(right))}


def median_seconds(world: World, sizes: Sizes, work: Callable[[], object]) -> float:
    """How long ``work`` takes on the device, all ranks at it together."""
    for _ in range(sizes.warmup):
        work()
    world.barrier()
    return statistics.median(_seconds(world.device, work) for _ in range(sizes.rounds))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
