"""Complete documents packed into rows of one length, computed from the document lengths alone.

Rows are filled by best fit, longest first (Johnson 1973; for language models Ding et al. 2024): each piece goes where
it leaves the least room, so little padding is needed. The rows of a data set are always the same; their order is set by
:mod:`amlaunch.trainer.data.sample_order`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from amlaunch.trainer.data.sample_order import Indices
from amlaunch.trainer.data.token_stream import Tokens, TokenStream

PIECE_BEGINS, UNLABELLED = 1, 2
"""Bits of a token's mark: it begins a piece; its label has no loss."""


@dataclass(frozen=True)
class Pieces:
    """The pieces to pack: complete documents, and segments of documents that are too long."""

    starts: Indices
    """Positions in the stream."""
    lengths: Indices
    labelled: npt.NDArray[np.bool_]
    """True if the last token has a label."""
    split_documents: int
    """Number of documents cut into several pieces."""


def cut_documents(starts: Indices, tokens: int, longest: int, *, every_label: bool) -> Pieces:
    """Cut the documents that begin at ``starts`` of a stream of ``tokens`` into pieces of at most ``longest``.

    ``every_label``: the last token of a document has the first token of the next document as its label.
    """
    lengths = np.diff(starts, append=tokens)
    counts = -(-lengths // longest)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    nth = np.arange(len(first)) - first
    begin = np.repeat(starts, counts) + nth * longest
    length = np.minimum(np.repeat(starts + lengths, counts) - begin, longest)
    labelled = np.full(len(begin), True) if every_label else nth + 1 < np.repeat(counts, counts)
    # Nothing follows the last token of the stream.
    labelled[begin + length >= tokens] = False
    return Pieces(begin, length, labelled, int(np.count_nonzero(counts > 1)))


def assign_rows(lengths: Indices, size: int) -> Indices:
    """Assign each piece to a row of ``size`` tokens; rows are numbered by their first piece.

    All pieces of one length are placed together: the row with the least sufficient room takes as many as fit, because
    its remaining room stays the least.
    """
    by_length = np.argsort(-lengths, kind="stable")
    groups = np.split(by_length, np.flatnonzero(np.diff(lengths[by_length])) + 1)
    rows_by_room: list[deque[Indices]] = [deque() for _ in range(size + 1)]
    # Bit r is set if there are rows with room for r tokens.
    available = 0
    rows = np.empty(len(lengths), dtype=np.int64)
    opened = 0

    for pieces in groups:
        length = int(lengths[pieces[0]])
        while len(pieces):
            fitting = available >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                open_rows = rows_by_room[room].popleft()
                if not rows_by_room[room]:
                    available ^= 1 << room
            else:
                room = size
                open_rows = np.arange(opened, opened - (-len(pieces) // (size // length)))
                opened += len(open_rows)

            pieces_per_row = room // length
            needed = -(-len(pieces) // pieces_per_row)
            if needed < len(open_rows):
                rows_by_room[room].appendleft(open_rows[needed:])
                available |= 1 << room
                open_rows = open_rows[:needed]
            placed = pieces[: pieces_per_row * len(open_rows)]
            rows[placed] = np.repeat(open_rows, pieces_per_row)[: len(placed)]

            # All rows are filled up with pieces of this length but perhaps the last one.
            full_rows, last_pieces = divmod(len(placed), pieces_per_row)
            for room_left, remaining_rows in (
                (room - pieces_per_row * length, open_rows[:full_rows]),
                (room - last_pieces * length, open_rows[full_rows:]),
            ):
                if room_left and len(remaining_rows):
                    rows_by_room[room_left].append(remaining_rows)
                    available |= 1 << room_left
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
        self.split_documents = pieces.split_documents

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._offsets) - 1

    def read(self, rows: Indices) -> tuple[Tokens, Tokens, Tokens]:
        """Read inputs and labels in their type on disk, and marks, uint8, each ``(M, size)``.

        A mark has PIECE_BEGINS where a piece begins and at every padding token, so that each of those is a piece by
        itself, and UNLABELLED where the label has no loss.
        """
        counts = self._offsets[rows + 1] - self._offsets[rows]
        row_starts = np.cumsum(counts) - counts
        pieces = np.repeat(self._offsets[rows] - row_starts, counts) + np.arange(counts.sum())
        lengths = self._lengths[pieces].astype(np.int64)
        used = np.add.reduceat(lengths, row_starts)
        padding = self.size - used
        ends = np.cumsum(lengths) + np.repeat(np.cumsum(padding) - padding, counts)
        begins = ends - lengths

        # One token more, for the last label.
        inputs = np.zeros(len(rows) * self.size + 1, dtype=self._stream.dtype)
        next_tokens = self._fill(inputs, self._starts[pieces], begins.tolist(), ends.tolist())
        labels = inputs[1:].copy()
        labels[ends - 1] = next_tokens

        is_padding = np.arange(self.size) >= used[:, None]
        marks = np.where(is_padding, PIECE_BEGINS | UNLABELLED, 0).astype(np.uint8).reshape(-1)
        marks[begins] |= PIECE_BEGINS
        marks[ends - 1] |= np.where(self._labelled[pieces], 0, UNLABELLED).astype(np.uint8)

        shape = (-1, self.size)
        return inputs[:-1].reshape(shape), labels.reshape(shape), marks.reshape(shape)

    def _fill(self, inputs: Tokens, starts: Indices, begins: list[int], ends: list[int]) -> list[int]:
        """Copy each piece into ``inputs`` and return the token after each; 0 at the end of the stream."""
        next_tokens = []
        for index, offset, begin, end in zip(*self._stream.locate(starts), begins, ends, strict=True):
            array = self._stream.arrays[index]
            last = offset + end - begin
            if last < len(array):
                inputs[begin:end] = array[offset:last]
                next_tokens.append(array.item(last))
            else:
                # The piece or the token after it is in the next array, or the stream ends.
                tokens = self._read_across_arrays(index, offset, end - begin + 1)
                inputs[begin:end] = tokens[:-1]
                next_tokens.append(tokens.item(-1))
        return next_tokens

    def _read_across_arrays(self, array: int, offset: int, length: int) -> Tokens:
        tokens = np.zeros(length, dtype=self._stream.dtype)
        begin = offset + (int(self._stream.ends[array - 1]) if array else 0)
        self._stream.copy(tokens[: min(length, len(self._stream) - begin)], array, offset)
        return tokens
