"""Measure the GPUs of one node: ``python -m amlaunch.trainer.tools.gpu_check --out FILE``.

Measures matrix products, copies, memory and all-reduce. All ranks measure at
the same time, because they share the node's power and cooling as in training.
Rank 0 writes the numbers of all ranks to one JSON file. Without CUDA the check
runs on the CPU with small sizes, so that it can be tried anywhere.
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
"""Timeout for the ranks to find each other, well below the time limit of the job."""


@dataclass(frozen=True)
class WorkSizes:
    """Sizes and repetitions of the measured work."""

    side: int
    """Rows and columns of the square matrices."""
    copy_bytes: int
    reduce_bytes: int
    warmup: int
    rounds: int


GPU_SIZES = WorkSizes(side=8192, copy_bytes=4 << 30, reduce_bytes=1 << 30, warmup=50, rounds=50)
CPU_SIZES = WorkSizes(side=256, copy_bytes=8 << 20, reduce_bytes=1 << 20, warmup=1, rounds=5)


def main(arguments: Sequence[str]) -> int:
    """Measure on this rank and return the exit code."""
    die_with_parent()
    parser = argparse.ArgumentParser(
        prog="python -m amlaunch.trainer.tools.gpu_check",
        description="Measure the GPUs of one node, one rank per GPU.",
        allow_abbrev=False,
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file that rank 0 writes")
    out = parser.parse_args(arguments).out
    return run_guarded(lambda: run(out))


def run(out: Path) -> int:
    """Join the other ranks and measure; rank 0 writes the numbers to ``out``."""
    world = join_world(Distributed(timeout_minutes=JOIN_MINUTES), read_rank_environment(os.environ))
    sizes = GPU_SIZES if world.device.type == "cuda" else CPU_SIZES
    free, total = device_memory(world.device)
    # one limit for all ranks, which also suits a GPU that another process uses
    max_bytes = min(world.all_gather(free)) // 8
    gemm_tflops = measure_gemm(world, sizes)
    copy_gb_s = measure_copy(world, sizes, min(sizes.copy_bytes, max_bytes))
    print(f"rank {world.rank}: {gemm_tflops:.4g} TFLOP/s, copies {copy_gb_s:.4g} GB/s", flush=True)
    reduced = measure_all_reduce(world, sizes, min(sizes.reduce_bytes, max_bytes)) if world.size > 1 else None

    gpus = world.all_gather(
        {
            "rank": world.rank,
            "host": platform.node(),
            **describe_device(world.device),
            "memory_free_bytes": free,
            "memory_total_bytes": total,
            "gemm_tflops": gemm_tflops,
            "copy_gb_s": copy_gb_s,
        }
    )
    if world.is_main:
        report = {**software_versions(world.device), "side": sizes.side, "gpus": gpus, "all_reduce": reduced}
        # every result names the files that its stage made; this one made none
        write_json(out, {"outputs": {}, **report})
    return OK


def device_memory(device: torch.device) -> tuple[int, int]:
    """Return ``(free, total)`` bytes of a device; call it before allocating anything there."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def describe_device(device: torch.device) -> dict[str, str]:
    """Return the device's name, and its UUID as in ``nvidia-smi``."""
    if device.type != "cuda":
        return {"device": "CPU", "uuid": ""}
    properties = torch.cuda.get_device_properties(device)
    return {"device": str(properties.name), "uuid": str(getattr(properties, "uuid", ""))}


def software_versions(device: torch.device) -> dict[str, Any]:
    """Return the versions of torch, CUDA and NCCL; ``cuda`` is False without a CUDA device."""
    cuda = device.type == "cuda"
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda and torch.distributed.is_nccl_available() else None
    return {"cuda": cuda, "torch": torch.__version__, "cuda_version": torch.version.cuda, "nccl": nccl}


def measure_gemm(world: World, sizes: WorkSizes, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the TFLOP/s of a square matrix product.

    The matrices are random, because zeros draw less power and so run faster.
    """
    left, right = (torch.randn(sizes.side, sizes.side, device=world.device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    seconds = median_seconds(world, sizes, lambda: torch.mm(left, right, out=product))
    return 2 * sizes.side**3 / seconds / 1e12


def measure_copy(world: World, sizes: WorkSizes, size: int) -> float:
    """Return the GB/s of memory, read and write together, while ``size`` bytes are copied on the device."""
    source = torch.ones(size, device=world.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = median_seconds(world, sizes, lambda: target.copy_(source))
    return 2 * size / seconds / 1e9


def measure_all_reduce(world: World, sizes: WorkSizes, size: int) -> dict[str, Any]:
    """Return the slowest rank's bus bandwidth of an all-reduce, as in nccl-tests, and whether the sum was right."""
    values = torch.full((max(1, size // 4),), float(world.rank + 1), device=world.device)
    world.sum(values)
    is_right = bool((values == world.size * (world.size + 1) / 2).all().item())
    # repeated sums would otherwise leave the range of float32
    values.zero_()
    seconds = max(world.all_gather(median_seconds(world, sizes, lambda: world.sum(values))))
    reduced_bytes = values.numel() * 4
    bus_bytes = reduced_bytes * 2 * (world.size - 1) / world.size
    return {"bytes": reduced_bytes, "bus_gb_s": bus_bytes / seconds / 1e9, "right": all(world.all_gather(is_right))}


def median_seconds(world: World, sizes: WorkSizes, work: Callable[[], object]) -> float:
    """Return the median duration of ``work`` on the device while all ranks run it."""
    for _ in range(sizes.warmup):
        work()
    world.barrier()
    return statistics.median(_seconds(world.device, work) for _ in range(sizes.rounds))


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


if __name__ == "__main__":
    exit_process(main(sys.argv[1:]))
