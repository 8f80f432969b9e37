"""Tokens a second that one process reads as shuffled windows, from shards on disk to inputs and labels in memory.

Usage: python benchmarks/data_path.py [MILLION_TOKENS]
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from preprocess.shards import write_shard
from trainer.data import NanogptDataset, Order, gather

SEQ_LEN = 1024
WINDOWS = 256
"""A step's part of one rank."""


def main() -> None:
    """Write random shards, read an epoch of them in shuffled order, print the rate."""
    millions = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(4):
            tokens = rng.integers(0, 50257, millions * 250_000).astype(np.uint16)
            write_shard(Path(folder) / f"train-00000-{shard:05d}.bin", [tokens], np.dtype(np.uint16))
        dataset = NanogptDataset(file_pattern=f"{folder}/*.bin", seq_len=SEQ_LEN, shuffle_files=True)
        order = Order(len(dataset), 0, True)
        for repeat in range(3):
            began = time.perf_counter()
            read = 0
            for start in range(0, len(dataset) - WINDOWS, WINDOWS):
                (rows,) = gather(dataset, order.windows(np.arange(start, start + WINDOWS)))
                read += rows[:, 1:].size
            print(f"pass {repeat + 1}: {read / (time.perf_counter() - began) / 1e6:,.0f} million tokens/s", flush=True)


if __name__ == "__main__":
    main()
