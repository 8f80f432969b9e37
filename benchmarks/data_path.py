"""Tokens a second that one process reads in shuffled order, from shards on disk to inputs and labels in memory.

Usage: python benchmarks/data_path.py [MILLION_TOKENS]

Four ways, one after another in each pass: windows, windows that begin with a
document, whole documents in packed rows, and a mixture of two sources. Printed
are rates of the wall clock and of this process's own CPU time, which other work
on the machine does not touch.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from amlaunch.preprocess.shards.shard_format import write_shard
from amlaunch.trainer.data.datasets import MixedDataset, NanogptDataset, read_samples

SEQ_LEN = 1024
SAMPLES = 256
"""A step's part of one rank."""
BOS = 50256
MEAN_DOCUMENT = 600
"""Tokens; lengths are log-normal, as those of web pages roughly are."""
PASSES = 3


def main() -> None:
    """Write random documents, read an epoch of them in each way, print the rates."""
    millions = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(4):
            write_shard(
                Path(folder) / f"train-00000-{shard:05d}.bin", documents(rng, millions * 250_000), np.dtype("<u2")
            )
        ways = {name: timed(name, make) for name, make in sets(folder).items()}
        for number in range(1, PASSES + 1):
            for name, dataset in ways.items():
                wall, own = rates(dataset)
                print(
                    f"pass {number}: {name:<8} {wall:6,.0f} million tokens/s, {own:6,.0f} a second of CPU time",
                    flush=True,
                )


def documents(rng: np.random.Generator, tokens: int) -> list[np.ndarray]:
    """Documents of ``tokens`` in all."""
    lengths = np.maximum(2, rng.lognormal(np.log(MEAN_DOCUMENT) - 0.5, 1.0, tokens // MEAN_DOCUMENT).astype(np.int64))
    ends = np.cumsum(lengths)
    stream = rng.integers(0, BOS, int(ends[-1])).astype("<u2")
    stream[ends - lengths] = BOS
    return np.split(stream, ends[:-1])


def sets(folder: str) -> dict[str, Any]:
    """What makes each way's data set."""
    shards = f"{folder}/*.bin"
    keys: dict[str, Any] = {"seq_len": SEQ_LEN, "shuffle_files": True}
    sources = {
        "web": {"file_pattern": f"{folder}/*0[01].bin", "weight": 0.7},
        "code": {"file_pattern": f"{folder}/*0[23].bin", "weight": 0.3},
    }
    return {
        "windows": lambda: NanogptDataset(file_pattern=shards, **keys),
        "aligned": lambda: NanogptDataset(file_pattern=shards, align_to_bos=True, **keys),
        "packed": lambda: NanogptDataset(file_pattern=shards, **keys).packed(SEQ_LEN),
        "mixed": lambda: MixedDataset(sources=sources, **keys),
    }


def timed(name: str, make: Any) -> Any:
    """What ``make`` makes, and how long it took said."""
    began = time.process_time()
    dataset = make()
    print(f"{name:<8} made in {time.process_time() - began:.2f} s of CPU time: {dataset.describe()}", flush=True)
    return dataset


def rates(dataset: Any) -> tuple[float, float]:
    """Million tokens a second of an epoch in shuffled order: by the wall clock, and by CPU time."""
    order = dataset.order(0)
    wall, own, read = time.perf_counter(), time.process_time(), 0
    for start in range(0, order.size - SAMPLES, SAMPLES):
        arrays = read_samples(dataset, order.samples(np.arange(start, start + SAMPLES)))
        read += len(arrays[0]) * dataset.seq_len
    return read / (time.perf_counter() - wall) / 1e6, read / (time.process_time() - own) / 1e6


if __name__ == "__main__":
    main()
