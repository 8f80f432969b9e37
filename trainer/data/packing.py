"""Whole documents in rows of one length, as an arithmetic of the documents' lengths alone.

Rows are filled by best fit, longest first (Johnson 1973; for language models
Ding et al. 2024): each piece goes where it leaves the least room, so few tokens
of padding are needed. The rows of a data set are always the same; in which
order they are seen is :mod:`amlaunch.trainer.data.sample_order`'s.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amlaunch.trainer.data.sample_order import Indices
from amlaunch.trainer.data.token_stream import Tokens, TokenStream

PIECE_BEGINS, UNLABELLED = 1, 2
"""Bits of a token's mark: a piece begins here; its label does not count."""


@dataclass(frozen=True)
class Pieces:
    """What is packed: whole documents, and parts of those that are too long."""

    starts: Indices
    """In the stream."""
    lengths: Indices
    labelled: npt.NDArray[np.bool_]
    """Whether the last token has a label."""
    split: int
    """Documents that are more than one piece."""


def cut_documents(starts: Indices, tokens: int, longest: int, *, every_label: bool) -> Pieces:
    """The documents that begin at ``starts`` of a stream of ``tokens``, in pieces of at most ``longest``.

    ``every_label``: the first token of the next document is the label of the last one's last token.
    """
    lengths = np.diff(starts, append=tokens)
    counts = -(-lengths // longest)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    nth = np.arange(len(first)) - first
    begin = np.repeat(starts, counts) + nth * longest
    length = np.minimum(np.repeat(starts + lengths, counts) - begin, longest)
    labelled = np.full(len(begin), True) if every_label else nth + 1 < np.repeat(counts, counts)
    labelled[begin + length >= tokens] = False  # nothing follows
    return Pieces(begin, length, labelled, int(np.count_nonzero(counts > 1)))


def assign_rows(lengths: Indices, size: int) -> Indices:
    """The row of each piece, rows of ``size`` tokens numbered by their first piece.

    All pieces of one length at once: the row with the least room that is enough
    takes as many as fit into it, for what is left of it is the least room again.
    """
    by_length = np.argsort(-lengths, kind="stable")
    groups = np.split(by_length, np.flatnonzero(np.diff(lengths[by_length])) + 1)
    rooms: list[deque[Indices]] = [deque() for _ in range(size + 1)]
    there = 0  # bit r: rows with room for r tokens
    rows = np.empty(len(lengths), dtype=np.int64)
    opened = 0
    for pieces in groups:
        length = int(lengths[pieces[0]])
        while len(pieces):
            fitting = there >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                free = rooms[room].popleft()
                there ^= 0 if rooms[room] else 1 << room
            else:
                room = size
                free = np.arange(opened, opened - (-len(pieces) // (size // length)))
                opened += len(free)
            each = room // length
            taken = -(-len(pieces) // each)
            if taken < len(free):
                rooms[room].appendleft(free[taken:])
                there |= 1 << room
                free = free[:taken]
            placed = pieces[: each * len(free)]
            rows[placed] = np.repeat(free, each)[: len(placed)]
            for left, which in (
                (room - each * length, free[: len(placed) // each]),
                (room - len(placed) % each * length, free[len(placed) // each :]),
            ):
                if left and len(which):
                    rooms[left].append(which)
                    there |= 1 << left
            pieces = pieces[len(placed) :]
    _, first, numbered = np.unique(rows, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[numbered]


class PackedRows:
    """Packed rows, read from the stream."""

    def __init__(self, stream: TokenStream, pieces: Pieces, rows: Indices, size: int):
        order = np.argsort(rows, kind="stable")
        self._stream = stream
        self._starts = pieces.starts[order]
        self._lengths = pieces.lengths[order].astype(np.int32)
        self._labelled = pieces.labelled[order]
        self._offsets = np.searchsorted(rows[order], np.arange(int(rows.max()) + 2))
        self.size = size
        self.split = pieces.split

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._offsets) - 1

    def read(self, rows: Indices) -> tuple[Tokens, Tokens, Tokens]:
        """Inputs and labels in the type they have on disk, and marks, uint8, each ``(M, size)``.

        A mark has BEGINS where a piece begins, and at every token of padding, so
        that each of those is a piece of its own; and UNLABELLED where no label counts.
        """
        counts = self._offsets[rows + 1] - self._offsets[rows]
        firsts = np.cumsum(counts) - counts
        which = np.repeat(self._offsets[rows] - firsts, counts) + np.arange(counts.sum())
        lengths = self._lengths[which].astype(np.int64)
        used = np.add.reduceat(lengths, firsts)
        padding = self.size - used
        ends = np.cumsum(lengths) + np.repeat(np.cumsum(padding) - padding, counts)
        inputs = np.zeros(len(rows) * self.size + 1, dtype=self._stream.dtype)  # the last one is nobody's input
        after = self._fill(inputs, self._starts[which], (ends - lengths).tolist(), ends.tolist())
        labels = inputs[1:].copy()
        labels[ends - 1] = after
        marks = (
            np.where(np.arange(self.size) >= used[:, None], PIECE_BEGINS | UNLABELLED, 0).astype(np.uint8).reshape(-1)
        )
        marks[ends - lengths] |= PIECE_BEGINS
        marks[ends - 1] |= np.where(self._labelled[which], 0, UNLABELLED).astype(np.uint8)
        return tuple(array.reshape(-1, self.size) for array in (inputs[:-1], labels, marks))  # type: ignore[return-value]

    def _fill(self, inputs: Tokens, starts: Indices, begins: list[int], ends: list[int]) -> list[int]:
        """Copy each piece to its place in ``inputs``, and give back the token that follows each (0 at the end of the stream)."""
        after = []
        for part, offset, begin, end in zip(*self._stream.locate(starts), begins, ends, strict=True):
            tokens = self._stream.parts[part]
            last = offset + end - begin
            if last < len(tokens):
                inputs[begin:end] = tokens[offset:last]
                after.append(tokens.item(last))
            else:  # it goes on in the next part, or is the end of the stream
                found = self._beyond(part, offset, end - begin)
                inputs[begin:end] = found[:-1]
                after.append(found.item(-1))
        return after

    def _beyond(self, part: int, offset: int, length: int) -> Tokens:
        whole = np.zeros(length + 1, dtype=self._stream.dtype)
        begin = offset + (int(self._stream.ends[part - 1]) if part else 0)
        self._stream.copy(whole[: min(length + 1, len(self._stream) - begin)], part, offset)
        return whole
