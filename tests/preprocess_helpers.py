"""Corpora and queries that the preprocess tests share."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np

from amlaunch.preprocess.progress import Progress
from amlaunch.preprocess.shards.output_folder import FinishedPart, OutputDir, read_part
from amlaunch.preprocess.shards.shard_format import open_tokens, read_ends
from amlaunch.preprocess.stages.element import run_element
from amlaunch.recipes.format.schema import Preprocess

WORDS = [
    "the",
    "a",
    "of",
    "to",
    "naïve",
    "straße",
    "東京",
    "data",
    "model",
    "loss\n",
    "token",
    "3.14",
    "<|endoftext|>",
    "été",
    "(x)",
    "=",
    "f(y);\t",
    "and",
    "so",
    "it",
    "goes",
    "🎉",
    "",
]


def text_of(seed: int, words: int) -> str:
    """Return text that depends only on the arguments; ``words`` 0 gives the empty text."""
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) + str(rng.randrange(1000)) * (rng.random() < 0.2) for _ in range(words))


def corpus(folder: Path, documents: int = 40, seed: int = 0, words: int = 60) -> list[str]:
    """Write text files of many lengths, one of them empty, in subfolders; return their texts."""
    rng = random.Random(seed)
    texts = []
    for i in range(documents):
        texts.append(text_of(seed * 1000 + i, 0 if i == 3 else rng.randrange(1, 2 * words)))
        path = folder / f"dir{i % 3}" / f"{i:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(texts[-1].encode())
    return texts


def make(
    options: Preprocess, out: Path, elements: range | None = None, lines: list[str] | None = None, workers: int = 0
) -> list[FinishedPart]:
    """Run elements (by default in this process), collect their log in ``lines``, and return their parts."""
    log = (lines if lines is not None else []).append
    indices = elements if elements is not None else range(options.elements)
    return [part for i in indices for part in run_element(options, i, out, Progress(log=log), workers)]


def parts_of(out: Path) -> list[FinishedPart]:
    """Return all finished parts, in order."""
    folder = OutputDir(out)
    parts = [read_part(folder, int(path.stem.rpartition("-")[2])) for path in sorted(out.glob("part-*.json"))]
    return [part for part in parts if part is not None]


def documents(out: Path, split: str | None = None) -> list[list[int]]:
    """Return the tokens of all documents on disk, in the source's order, BOS included."""
    entries = [entry for part in parts_of(out) for entry in part.shards if split in (None, entry.split)]
    return [document for entry in entries for document in cut(out / entry.file)]


def cut(path: Path) -> list[list[int]]:
    """Return the tokens of each document of one shard."""
    tokens, ends = open_tokens(path), read_ends(path)
    return [tokens[a:b].tolist() for a, b in zip([0, *ends[:-1].astype(np.int64)], ends.astype(np.int64), strict=True)]


def everything(out: Path) -> dict[str, bytes]:
    """Return the contents of every file of an output folder except the locks."""
    return {
        path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file() and ".lock" not in path.name
    }
