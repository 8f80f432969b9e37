"""How a source of files is cut into parts: by size, and by nothing that could differ from run to run.

A large file that can be entered in the middle (Parquet, uncompressed JSON
lines) is cut into slices; contiguous slices make up a part. Nothing is opened
for that: which row groups or lines a slice holds is found when it is read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import IO, Protocol

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Preprocess

PARTS = 16
"""Of a source that is small: enough for the cores of most machines."""
SMALLEST = 1 << 16
"""Bytes of a part below which more parts are not worth their files."""
MOST_SLICES = 1024
"""Of a file."""
MOST_PARTS = 4096
"""Of what a budget leaves over, about."""
BYTES_A_TOKEN = 4
"""About, of stored text. Only sizes depend on it."""


class File(Protocol):
    """A file to read documents from, here or elsewhere."""

    @property
    def name(self) -> str:
        """Path below the source's root, with ``/``; the ending says what it is."""
        ...

    @property
    def place(self) -> str:
        """What people call it: its whole path, or its address."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def open(self) -> IO[bytes]:
        """Its bytes, seekable."""
        ...


JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson")


def kind(name: str) -> str:
    """``parquet``, ``jsonl`` or ``text``, by the ending."""
    if name.endswith(JSON_LINES):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def can_be_cut(name: str) -> bool:
    """Whether reading may begin in the middle."""
    return name.endswith((".parquet", ".jsonl", ".ndjson"))


@dataclass(frozen=True)
class Slice:
    """The ``index``-th of ``count`` equal slices of a file."""

    file: File
    index: int = 0
    count: int = 1

    @property
    def begin(self) -> int:
        """First byte."""
        return self.file.size * self.index // self.count

    @property
    def end(self) -> int:
        """Byte behind the last."""
        return self.file.size * (self.index + 1) // self.count


def cut(files: Sequence[File], options: Preprocess) -> list[tuple[Slice, ...]]:
    """The parts of a source, in order, about a shard each, or smaller where the source or the budget is small.

    A budget uses the front of the source alone, so only that is cut finely.
    Raises BadInput where ``parts`` asks for more than there are slices.
    """
    total = sum(file.size for file in files)
    if options.parts:
        parts = _group(files, options.parts)
        if len(parts) < options.parts:
            raise BadInput(f"preprocess.parts: {options.parts}, but there are only {len(parts)} files to make them of")
        return parts
    shard = BYTES_A_TOKEN * options.shard_tokens
    used = total if options.max_tokens is None else min(total, 2 * BYTES_A_TOKEN * options.max_tokens)
    front = _front(files, 2 * used)
    return [
        *_cut_evenly(files[:front], max(SMALLEST, min(-(-used // PARTS), shard))),
        *_cut_evenly(files[front:], max(shard, total // MOST_PARTS)),
    ]


def _front(files: Sequence[File], size: int) -> int:
    """How many files, from the first, it takes to have ``size`` bytes."""
    before = 0
    for number, file in enumerate(files):
        if number and before >= size:
            return number
        before += file.size
    return len(files)


def _cut_evenly(files: Sequence[File], target: int) -> list[tuple[Slice, ...]]:
    return _group(files, max(1, -(-sum(file.size for file in files) // target))) if files else []


def _group(files: Sequence[File], wanted: int) -> list[tuple[Slice, ...]]:
    target = max(1, sum(file.size for file in files) // wanted)
    slices = [piece for file in files for piece in _slices(file, target)]
    sizes = [piece.end - piece.begin for piece in slices]
    return [tuple(slices[i] for i in range_) for range_ in partition(sizes, min(wanted, len(slices)))]


def _slices(file: File, target: int) -> Iterator[Slice]:
    count = min(max(1, -(-file.size // target)), max(1, file.size), MOST_SLICES) if can_be_cut(file.name) else 1
    return (Slice(file, index, count) for index in range(count))


def partition(sizes: Sequence[int], parts: int) -> list[range]:
    """Contiguous ranges over ``sizes``, none empty, as even in bytes as whole pieces allow (``len(sizes) >= parts``).

    A piece belongs to the part in which its middle lies.
    """
    weights = [size + 1 for size in sizes]  # an empty file is work too
    total = sum(weights)
    doubled_middles = [2 * end - weight for end, weight in zip(accumulate(weights), weights, strict=True)]
    cuts = [0]
    for part in range(1, parts):
        place = bisect_left(doubled_middles, -(-2 * total * part // parts))
        cuts.append(min(max(place, cuts[-1] + 1), len(sizes) - (parts - part)))
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]


def owners(sizes: Sequence[int], elements: int) -> list[int]:
    """Which element takes each part: in order, the one with the fewest bytes so far.

    So the elements are balanced, and all of them work on the front of the
    source, where a budget is spent.
    """
    taken = [0] * elements
    found = []
    for size in sizes:
        owner = min(range(elements), key=taken.__getitem__)
        taken[owner] += size + 1
        found.append(owner)
    return found


def val_shares(sizes: Sequence[int], val: int) -> list[int]:
    """How many tokens of each part, at least, are validation: the front of the source, an eighth of a token a byte.

    Where that is not enough, all parts take their share by size.
    """
    shares, left = [], val
    for size in sizes:
        shares.append(min(left, size // 8))
        left -= shares[-1]
    if left:
        total = sum(size + 1 for size in sizes)
        marks = [val * end // total for end in accumulate((size + 1 for size in sizes), initial=0)]
        shares = [b - a for a, b in pairwise(marks)]
    return shares
