"""Token shards on disk as one long stream, and where its documents begin.

Read are ``.bin`` shards with a header (ours, llm.c's, modded-nanogpt's, NeMo's;
see :mod:`~amlaunch.preprocess.shards.shard_format`) and bare uint16 tokens, as nanoGPT writes them.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amlaunch.preprocess.shards.shard_format import (
    MAGIC_SIZED,
    MAGIC_UINT16,
    MANIFEST,
    index_path,
    open_tokens,
    read_ends,
    read_manifest,
)
from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.trainer.data.sample_order import Indices

Tokens = npt.NDArray[Any]
FORMATS = ("bin", "raw")
SCAN_BLOCK_TOKENS = 1 << 24
"""Tokens that are compared at once where documents are looked for."""
MAX_SAMPLED_DOCUMENTS = 1000
"""Documents whose first tokens are looked at, to see with what documents begin."""


@dataclass(frozen=True)
class Shard:
    """The tokens of one file, mapped."""

    path: Path
    tokens: Tokens
    identity: dict[str, Any]
    """What another file of this name would differ in."""


# --- which files ----------------------------------------------------------------------------------------


def open_matching_shards(pattern: str | list[str], layout: str, split: str) -> list[Shard]:
    """The shards that a glob, a list of globs, or a manifest's path names, each pattern's in the order of their names.

    Raises BadInput where a pattern matches nothing, or a file is no whole shard.
    """
    shards: list[Shard] = []
    for one in [pattern] if isinstance(pattern, str) else pattern:
        paths = sorted(Path(name) for name in glob.glob(one, recursive=True))
        if not paths:
            raise BadInput(f"dataset.file_pattern: nothing matches {one!r} (seen from {Path.cwd()})")
        for path in paths:
            shards += open_manifest_shards(path.parent, split) if path.name == MANIFEST else [_opened(path, layout)]
    return shards


def _opened(path: Path, layout: str) -> Shard:
    tokens = (
        _open_raw(path) if layout == "raw" else open_tokens(path)
    )  # which says what is wrong, also with a link to nowhere
    return Shard(path, tokens, {"file": path.name, "bytes": path.stat().st_size})


def _open_raw(path: Path) -> Tokens:
    """Bare little-endian uint16. Raises BadInput for an empty file, one of odd size, and one that has a header."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if size == 0 or size % 2:
        raise BadInput(
            f"{path}: {size} bytes are {'no tokens' if size == 0 else 'no whole number of uint16 tokens: truncated, or another format'}"
        )
    tokens = np.memmap(path, dtype="<u2", mode="r")
    if size >= 4 and int(tokens[:2].view("<i4")[0]) in (MAGIC_UINT16, MAGIC_SIZED):
        raise BadInput(f"{path}: has the header of a token shard; write dataset.format bin")
    return tokens


def open_manifest_shards(folder: Path, split: str) -> list[Shard]:
    """The shards of a split, as our manifest lists them. Raises BadInput where they are not what it counted."""
    splits = read_manifest(folder)["splits"]
    if not splits.get(split):
        filled = [name for name, shards in splits.items() if shards]
        raise BadInput(f"{folder}: the manifest has no split {split!r}; {did_you_mean(split, filled)}")
    return [_listed(folder, entry) for entry in splits[split]]


def _listed(folder: Path, entry: dict[str, Any]) -> Shard:
    path = folder / entry["file"]
    tokens = open_tokens(path)
    if len(tokens) != entry["tokens"]:
        raise BadInput(f"{path}: {len(tokens)} tokens, but the manifest counts {entry['tokens']}; preprocess again")
    return Shard(path, tokens, {"file": path.name, "sha256": entry["sha256"]})


# --- the stream -----------------------------------------------------------------------------------------


class TokenStream:
    """Arrays of tokens, one after another, read at any place."""

    def __init__(self, parts: Sequence[Tokens]):
        self.parts = [
            np.asarray(part) for part in parts
        ]  # slices of a memmap are objects of its own class, which are slow to make
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.dtype = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self.ends[-1])

    def read(self, starts: Indices, length: int) -> Tokens:
        """``(M, length)`` tokens, each row from one of ``starts`` on."""
        rows = np.empty((len(starts), length), dtype=self.dtype)
        for row, part, offset in zip(rows, *self.locate(starts), strict=True):
            self.copy(row, part, offset)
        return rows

    def locate(self, starts: Indices) -> tuple[list[int], list[int]]:
        """In which part each of ``starts`` lies, and where in it."""
        parts = np.searchsorted(self.ends, starts, side="right")
        offsets = starts - np.where(parts > 0, self.ends[parts - 1], 0)
        return parts.tolist(), offsets.tolist()

    def copy(self, row: Tokens, part: int, offset: int) -> None:
        """Fill ``row`` with the tokens from ``offset`` of ``part`` on."""
        found = self.parts[part][offset : offset + len(row)]
        done = len(found)
        row[:done] = found
        while done < len(row):  # only where it goes on in the next part
            part += 1
            found = self.parts[part][: len(row) - done]
            row[done : done + len(found)] = found
            done += len(found)

    def at(self, places: Indices) -> Tokens:
        """Single tokens."""
        return self.read(places, 1)[:, 0]


# --- its documents --------------------------------------------------------------------------------------


def document_starts(shards: Sequence[Shard], bos: int | None) -> Indices:
    """Where documents begin in the stream of all ``shards``.

    Of a shard with our index (``x.idx`` beside ``x.bin``) that says it; another
    is searched for the token ``bos``. (NeMo's ``x.bos.idx`` is not read: it counts
    in units that its own reader takes for others.) Raises BadInput where there
    is neither, or documents begin with another token than ``bos``.
    """
    found, base = [], 0
    for shard in shards:
        found.append(_starts(shard, bos) + base)
        base += len(shard.tokens)
    return np.concatenate(found)


def _starts(shard: Shard, bos: int | None) -> Indices:
    if index_path(shard.path) != shard.path and index_path(shard.path).exists():
        starts = np.concatenate([[0], read_ends(shard.path)[:-1].astype(np.int64)])
        first = common_first_token(TokenStream([shard.tokens]), starts)
        if bos is not None and first != bos:
            seen = "different tokens" if first is None else f"token {first}"
            raise BadInput(f"{shard.path}: dataset.bos_token is {bos}, but its documents begin with {seen}")
        return starts
    if bos is None:
        raise BadInput(
            f"{shard.path}: no index of its documents ({index_path(shard.path).name}); dataset.bos_token says with which token they begin"
        )
    return find_token(shard.tokens, bos)


def find_token(tokens: Tokens, bos: int) -> Indices:
    """Every place of the token ``bos``."""
    blocks = [
        np.flatnonzero(tokens[begin : begin + SCAN_BLOCK_TOKENS] == bos) + begin
        for begin in range(0, len(tokens), SCAN_BLOCK_TOKENS)
    ]
    return np.concatenate(blocks).astype(np.int64)


def common_first_token(stream: TokenStream, starts: Indices) -> int | None:
    """The token that documents begin with, as a sample of them shows; None where it is not always the same."""
    firsts = stream.at(starts[:: max(1, len(starts) // MAX_SAMPLED_DOCUMENTS)])
    return int(firsts[0]) if len(firsts) and np.all(firsts == firsts[0]) else None


def aligned_starts(documents: Indices, tokens: int, length: int) -> Indices:
    """Samples of ``length`` inputs and a label more that each begin with a document: the first, then the next document
    that begins where the sample before has ended, or later."""
    after = np.searchsorted(documents, documents + length)
    last = int(np.searchsorted(documents, tokens - length))  # from here on there are not enough tokens
    jump = after.data  # its items become whole numbers of Python one by one, not all at once
    chain, here = [], 0
    while here < last:
        chain.append(here)
        here = jump[here]
    return documents[np.array(chain, dtype=np.int64)]
