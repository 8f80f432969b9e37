"""Cutting a source of files into parts: by size, and by nothing that could differ between runs.

A large file that can be entered in the middle (Parquet, uncompressed JSON lines) is cut into slices; contiguous slices
make up a part. No file is opened for that: the row groups or lines of a slice are located when it is read.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import IO, Protocol

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Preprocess

MIN_PARTS = 16
"""Parts of a small source: enough for the cores of most machines."""
MIN_PART_BYTES = 1 << 16
"""Smaller parts would not be worth their files."""
MAX_SLICES_PER_FILE = 1024
MAX_PARTS_BEYOND_BUDGET = 4096
"""Parts of the data that a budget leaves unused, approximately."""
BYTES_PER_TOKEN = 4
"""Of stored text, approximately. Only the sizes of parts depend on it."""
MIN_BYTES_PER_VAL_TOKEN = 8
"""A part gives validation at most one token per this many bytes, so that it certainly has enough tokens."""


class SourceFile(Protocol):
    """A file to read documents from, local or remote."""

    @property
    def name(self) -> str:
        """Path below the source's root, with ``/``; the suffix determines the format."""
        ...

    @property
    def location(self) -> str:
        """The full path or URL, for messages."""
        ...

    @property
    def size(self) -> int:
        """Bytes."""
        ...

    def open(self) -> IO[bytes]:
        """Open it as a seekable binary file."""
        ...


JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson")


def file_format(name: str) -> str:
    """Return ``parquet``, ``jsonl`` or ``text``, by the suffix."""
    if name.endswith(JSON_LINES_SUFFIXES):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


def is_splittable(name: str) -> bool:
    """Return True if reading may begin in the middle of the file."""
    return name.endswith((".parquet", ".jsonl", ".ndjson"))


@dataclass(frozen=True)
class FileSlice:
    """The ``index``-th of ``count`` equal slices of a file."""

    file: SourceFile
    index: int = 0
    count: int = 1

    @property
    def begin(self) -> int:
        """First byte."""
        return self.file.size * self.index // self.count

    @property
    def end(self) -> int:
        """Byte after the last."""
        return self.file.size * (self.index + 1) // self.count

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin


def cut_into_parts(files: Sequence[SourceFile], options: Preprocess) -> list[tuple[FileSlice, ...]]:
    """Cut files into parts, in order: about one shard each, or smaller if the source or the budget is small.

    A budget uses only the front of the source, so only the front is cut finely. Raises BadInput if ``parts`` exceeds
    the number of slices.
    """
    if options.parts:
        parts = _group(files, options.parts)
        if len(parts) < options.parts:
            raise BadInput(
                f"preprocess.parts: {options.parts}, but these files can be cut into at most {len(parts)} parts. "
                f"Lower it, or remove it"
            )
        return parts

    total = sum(file.size for file in files)
    shard = BYTES_PER_TOKEN * options.shard_tokens
    used = total if options.max_tokens is None else min(total, 2 * BYTES_PER_TOKEN * options.max_tokens)
    front = _count_front_files(files, 2 * used)

    small_source = max(MIN_PART_BYTES, min(-(-used // MIN_PARTS), shard))
    beyond_budget = max(shard, total // MAX_PARTS_BEYOND_BUDGET)
    return [*_cut_by_size(files[:front], small_source), *_cut_by_size(files[front:], beyond_budget)]


def _count_front_files(files: Sequence[SourceFile], size: int) -> int:
    """Count the files, from the first, that it takes to reach ``size`` bytes."""
    before = 0
    for number, file in enumerate(files):
        if number and before >= size:
            return number
        before += file.size
    return len(files)


def _cut_by_size(files: Sequence[SourceFile], part_bytes: int) -> list[tuple[FileSlice, ...]]:
    if not files:
        return []
    return _group(files, max(1, -(-sum(file.size for file in files) // part_bytes)))


def _group(files: Sequence[SourceFile], count: int) -> list[tuple[FileSlice, ...]]:
    """Cut files into ``count`` parts, or fewer if there are not enough slices."""
    part_bytes = max(1, sum(file.size for file in files) // count)
    slices = [file_slice for file in files for file_slice in _slices(file, part_bytes)]
    ranges = partition([file_slice.size for file_slice in slices], min(count, len(slices)))
    return [tuple(slices[i] for i in indices) for indices in ranges]


def _slices(file: SourceFile, slice_bytes: int) -> Iterator[FileSlice]:
    count = 1
    if is_splittable(file.name):
        count = min(max(1, -(-file.size // slice_bytes)), max(1, file.size), MAX_SLICES_PER_FILE)
    return (FileSlice(file, index, count) for index in range(count))


def partition(sizes: Sequence[int], parts: int) -> list[range]:
    """Cut ``sizes`` into contiguous, nonempty index ranges, as even in bytes as entire items allow.

    An item belongs to the range that contains its middle. Requires ``len(sizes) >= parts``.
    """
    # Each item weighs one byte more than its size, because an empty file is work too.
    weights = [size + 1 for size in sizes]
    total = sum(weights)
    doubled_middles = [2 * end - weight for end, weight in zip(accumulate(weights), weights, strict=True)]

    cuts = [0]
    for part in range(1, parts):
        nearest = bisect_left(doubled_middles, -(-2 * total * part // parts))
        cuts.append(min(max(nearest, cuts[-1] + 1), len(sizes) - (parts - part)))
    return [range(begin, end) for begin, end in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]


def assign_parts(sizes: Sequence[int], elements: int) -> list[int]:
    """Return the element that makes each part: in order, the one with the fewest bytes so far.

    This balances the elements, and all of them work on the front of the source, where a budget is spent.
    """
    assigned_bytes = [0] * elements
    owners = []
    for size in sizes:
        owner = min(range(elements), key=assigned_bytes.__getitem__)
        assigned_bytes[owner] += size + 1
        owners.append(owner)
    return owners


def assign_val_tokens(sizes: Sequence[int], val_tokens: int) -> list[int]:
    """Return each part's minimum of validation tokens: the front of the source, one token per eight bytes.

    If that is not enough, every part gives a share in proportion to its size.
    """
    shares, remaining = [], val_tokens
    for size in sizes:
        shares.append(min(remaining, size // MIN_BYTES_PER_VAL_TOKEN))
        remaining -= shares[-1]
    if remaining == 0:
        return shares

    total = sum(size + 1 for size in sizes)
    marks = [val_tokens * end // total for end in accumulate((size + 1 for size in sizes), initial=0)]
    return [end - begin for begin, end in pairwise(marks)]
