"""Measure how many tokens per second one process reads in shuffled order, from shards on disk to arrays in memory.

Usage: python benchmarks/data_path.py [MILLION_TOKENS]

Each pass reads four data sets in turn: plain samples, samples that begin with a
document, packed documents, and a mixture of two sources. Rates are given per
second of wall time, and per second of this process's CPU time, which other work
on the machine does not affect.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from amlaunch.preprocess.shards.shard_format import write_shard
from amlaunch.trainer.data.datasets import MixedDataset, NanogptDataset, read_samples

SEQ_LEN = 1024
RANK_SAMPLES = 256
"""Samples that one rank reads per step."""
BOS = 50256
MEAN_DOCUMENT_TOKENS = 600
"""Lengths are log-normal, roughly like those of web pages."""
PASSES = 3


def main() -> None:
    """Write random documents, read an epoch of each data set per pass, and print the rates."""
    millions = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(4):
            path = Path(folder) / f"train-00000-{shard:05d}.bin"
            write_shard(path, random_documents(rng, millions * 250_000), np.dtype("<u2"))
        datasets = {name: build(name, factory) for name, factory in dataset_factories(folder).items()}
        for number in range(1, PASSES + 1):
            for name, dataset in datasets.items():
                wall, cpu = read_rates(dataset)
                print(
                    f"pass {number}: {name:<8} {wall:6,.0f} million tokens/s, {cpu:6,.0f} per second of CPU time",
                    flush=True,
                )


def random_documents(rng: np.random.Generator, tokens: int) -> list[np.ndarray]:
    """Return documents of about ``tokens`` tokens in total."""
    mean = np.log(MEAN_DOCUMENT_TOKENS) - 0.5
    lengths = np.maximum(2, rng.lognormal(mean, 1.0, tokens // MEAN_DOCUMENT_TOKENS).astype(np.int64))
    ends = np.cumsum(lengths)
    stream = rng.integers(0, BOS, int(ends[-1])).astype("<u2")
    stream[ends - lengths] = BOS
    return np.split(stream, ends[:-1])


def dataset_factories(folder: str) -> dict[str, Callable[[], Any]]:
    """Return a factory for each data set."""
    shards = f"{folder}/*.bin"
    keys: dict[str, Any] = {"seq_len": SEQ_LEN, "shuffle_files": True}
    sources = {
        "web": {"file_pattern": f"{folder}/*0[01].bin", "weight": 0.7},
        "code": {"file_pattern": f"{folder}/*0[23].bin", "weight": 0.3},
    }
    return {
        "plain": lambda: NanogptDataset(file_pattern=shards, **keys),
        "aligned": lambda: NanogptDataset(file_pattern=shards, align_to_bos=True, **keys),
        "packed": lambda: NanogptDataset(file_pattern=shards, **keys).packed(SEQ_LEN),
        "mixed": lambda: MixedDataset(sources=sources, **keys),
    }


def build(name: str, factory: Callable[[], Any]) -> Any:
    """Build a data set, and print how long that took."""
    started = time.process_time()
    dataset = factory()
    print(f"{name:<8} built in {time.process_time() - started:.2f} s of CPU time: {dataset.describe()}", flush=True)
    return dataset


def read_rates(dataset: Any) -> tuple[float, float]:
    """Read an epoch in shuffled order; return million tokens per second of wall time and of CPU time."""
    order = dataset.order(0)
    wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for start in range(0, order.size - RANK_SAMPLES, RANK_SAMPLES):
        arrays = read_samples(dataset, order.samples(np.arange(start, start + RANK_SAMPLES)))
        tokens += len(arrays[0]) * dataset.seq_len
    return tokens / (time.perf_counter() - wall) / 1e6, tokens / (time.process_time() - cpu) / 1e6


if __name__ == "__main__":
    main()
