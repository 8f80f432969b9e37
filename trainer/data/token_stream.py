"""Token shards on disk as one long stream, and the starts of its documents.

Supports ``.bin`` shards with a header (ours, llm.c's, modded-nanogpt's, NeMo's; see
:mod:`~amlaunch.preprocess.shards.shard_format`) and bare uint16 tokens, as nanoGPT writes them.
"""

from __future__ import annotations

import glob
import mmap
import os
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
    map_file,
    open_tokens,
    read_ends,
    read_manifest,
)
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import read_json
from amlaunch.recipes.suggestions import did_you_mean
from amlaunch.trainer.data.sample_order import Indices

Tokens = npt.NDArray[Any]
FORMATS = ("bin", "raw")
SCAN_BLOCK_TOKENS = 1 << 24
"""Tokens compared at once in the search for documents."""
MAX_SAMPLED_DOCUMENTS = 1000
"""Approximate number of documents whose first tokens are compared."""


@dataclass(frozen=True)
class Shard:
    """The memory-mapped tokens of one file."""

    path: Path
    tokens: Tokens
    identity: dict[str, Any]
    """Facts that identify the file, besides its name."""


# --- files ----------------------------------------------------------------------------------------------


def open_matching_shards(pattern: str | list[str], layout: str, split: str) -> list[Shard]:
    """Open the shards of a glob, a list of globs, or a manifest's path; those of each pattern sorted by name.

    If a pattern matches several splits of a folder that preprocess made, only the shards of ``split`` are taken. Raises
    BadInput if a pattern matches nothing or a file is not a complete shard.
    """
    shards: list[Shard] = []
    for file_pattern in [pattern] if isinstance(pattern, str) else pattern:
        paths = sorted(Path(name) for name in glob.glob(os.path.expanduser(file_pattern), recursive=True))
        if not paths:
            raise BadInput(f"dataset.file_pattern: no file matches {file_pattern!r} (working directory: {Path.cwd()})")
        for path in without_other_splits(paths, split):
            if path.name == MANIFEST:
                shards += open_manifest_shards(path.parent, split)
            else:
                shards.append(_open_shard(path, layout))
    return shards


def without_other_splits(paths: Sequence[Path], split: str) -> list[Path]:
    """Leave out the shards of other splits, where ``paths`` has several splits of one folder."""
    split_of: dict[Path, str] = {}
    for folder in {path.parent for path in paths}:
        for name, entries in folder_manifest(folder).get("splits", {}).items():
            split_of |= {folder / entry["file"]: name for entry in entries}
    splits = {(path.parent, split_of[path]) for path in paths if path in split_of}
    mixed = {folder for folder, name in splits if (folder, split) in splits and name != split}
    return [path for path in paths if path.parent not in mixed or split_of.get(path, split) == split]


def folder_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest that preprocess left in ``folder``; empty if there is none, or another program's."""
    try:
        manifest = read_json(folder / MANIFEST)
    except ValueError:
        manifest = None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("splits"), dict) else {}


def shards_folder(data: Path | None, section: dict[str, Any]) -> Path | None:
    """Return ``data``, else the folder of a data set's ``file_pattern`` that has our manifest, if there is one."""
    if data is not None:
        return data
    patterns = section.get("file_pattern") or []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for name in sorted(glob.glob(os.path.expanduser(pattern), recursive=True))[:1]:
            if folder_manifest(Path(name).parent):
                return Path(name).parent
    return None


def _open_shard(path: Path, layout: str) -> Shard:
    # Opened before stat(), because opening reports a broken link clearly.
    tokens = _open_raw(path) if layout == "raw" else open_tokens(path)
    return Shard(path, tokens, {"file": path.name, "bytes": path.stat().st_size})


def _open_raw(path: Path) -> Tokens:
    """Open bare little-endian uint16. Raises BadInput for an empty file, an odd size, or a file with a header."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    if size == 0:
        raise BadInput(f"{path} is empty (0 bytes)")
    if size % 2:
        raise BadInput(
            f"{path}: {size} bytes is not a multiple of 2 (uint16): the file is truncated, or not of dataset.format raw"
        )
    tokens = map_file(path, "<u2")
    if size >= 4 and int(tokens[:2].view("<i4")[0]) in (MAGIC_UINT16, MAGIC_SIZED):
        raise BadInput(f"{path} has the header of a token shard; set dataset.format: bin")
    return tokens


def open_manifest_shards(folder: Path, split: str) -> list[Shard]:
    """Open the shards of a split that our manifest lists. Raises BadInput if their token counts differ from it."""
    splits = read_manifest(folder)["splits"]
    if not splits.get(split):
        nonempty = [name for name, shards in splits.items() if shards]
        raise BadInput(f"{folder}: the manifest has no split {split!r}; {did_you_mean(split, nonempty)}")
    return [_open_listed_shard(folder, entry) for entry in splits[split]]


def _open_listed_shard(folder: Path, entry: dict[str, Any]) -> Shard:
    path = folder / entry["file"]
    tokens = open_tokens(path)
    if len(tokens) != entry["tokens"]:
        raise BadInput(
            f"{path}: expected {entry['tokens']} tokens as in the manifest, got {len(tokens)}; "
            "run the preprocess and verify stages again"
        )
    return Shard(path, tokens, {"file": path.name, "sha256": entry["sha256"]})


# --- the stream -----------------------------------------------------------------------------------------


class TokenStream:
    """Consecutive arrays of tokens that can be read as one, at any position."""

    def __init__(self, arrays: Sequence[Tokens]):
        bases: list[Any] = [array.base for array in arrays]
        self._maps = [base for base in bases if isinstance(base, mmap.mmap)]
        # Slices of a memmap are memmaps, which are slow to create.
        self.arrays = [np.asarray(array) for array in arrays]
        self.ends = np.cumsum([len(array) for array in arrays], dtype=np.int64)
        self.dtype = max((array.dtype for array in arrays), key=lambda dtype: dtype.itemsize)

    def __len__(self) -> int:
        """Return the number of tokens."""
        return int(self.ends[-1])

    def expect_random_reads(self) -> None:
        """Keep the kernel from reading megabytes ahead for each window of a few kilobytes of a cold file."""
        for file_map in self._maps:
            if hasattr(mmap, "MADV_RANDOM"):
                file_map.madvise(mmap.MADV_RANDOM)

    def read(self, starts: Indices, length: int) -> Tokens:
        """Read ``(M, length)`` tokens, one row from each of ``starts``."""
        rows = np.empty((len(starts), length), dtype=self.dtype)
        for row, array, offset in zip(rows, *self.locate(starts), strict=True):
            self.copy(row, array, offset)
        return rows

    def locate(self, starts: Indices) -> tuple[list[int], list[int]]:
        """Return the index of the array that contains each of ``starts``, and the offset in that array."""
        arrays = np.searchsorted(self.ends, starts, side="right")
        offsets = starts - np.where(arrays > 0, self.ends[arrays - 1], 0)
        return arrays.tolist(), offsets.tolist()

    def copy(self, row: Tokens, array: int, offset: int) -> None:
        """Fill ``row`` with the tokens from ``offset`` of the array with index ``array`` on."""
        tokens = self.arrays[array][offset : offset + len(row)]
        filled = len(tokens)
        row[:filled] = tokens
        # Only if the row continues in the next array.
        while filled < len(row):
            array += 1
            tokens = self.arrays[array][: len(row) - filled]
            row[filled : filled + len(tokens)] = tokens
            filled += len(tokens)

    def tokens_at(self, positions: Indices) -> Tokens:
        """Read single tokens."""
        return self.read(positions, 1)[:, 0]


# --- documents ------------------------------------------------------------------------------------------


def document_starts(shards: Sequence[Shard], bos: int | None) -> Indices:
    """Return the starts of documents in the stream of all ``shards``.

    They come from a shard's index (``x.idx`` beside ``x.bin``), or else from a search for the token ``bos``. (NeMo's
    ``x.bos.idx`` is not read: its units are not those that its own reader expects.) Raises BadInput if there is
    neither, or if documents begin with another token than ``bos``.
    """
    starts, base = [], 0
    for shard in shards:
        starts.append(_shard_document_starts(shard, bos) + base)
        base += len(shard.tokens)
    return np.concatenate(starts)


def _shard_document_starts(shard: Shard, bos: int | None) -> Indices:
    index = index_path(shard.path)
    if index != shard.path and index.exists():
        starts = np.concatenate([[0], read_ends(shard.path)[:-1].astype(np.int64)])
        first = common_first_token(TokenStream([shard.tokens]), starts)
        if bos is not None and first != bos:
            actual = "different tokens" if first is None else f"token {first}"
            raise BadInput(f"{shard.path}: dataset.bos_token is {bos}, but its documents begin with {actual}")
        return starts
    if bos is None:
        raise BadInput(
            f"{shard.path} has no document index ({index.name}); set dataset.bos_token to the token that begins "
            "each document"
        )
    return find_token(shard.tokens, bos)


def find_token(tokens: Tokens, token: int) -> Indices:
    """Return every position of ``token``."""
    blocks = [
        np.flatnonzero(tokens[begin : begin + SCAN_BLOCK_TOKENS] == token) + begin
        for begin in range(0, len(tokens), SCAN_BLOCK_TOKENS)
    ]
    return np.concatenate(blocks).astype(np.int64)


def common_first_token(stream: TokenStream, starts: Indices) -> int | None:
    """Return the token that a sample of the documents begins with; None if they differ."""
    first_tokens = stream.tokens_at(starts[:: max(1, len(starts) // MAX_SAMPLED_DOCUMENTS)])
    return int(first_tokens[0]) if len(first_tokens) and np.all(first_tokens == first_tokens[0]) else None


def aligned_starts(documents: Indices, tokens: int, length: int) -> Indices:
    """Return the starts of windows of ``length`` inputs and one more label, each at the start of a document.

    The first window starts with the first document, each other with the first document at or after the end of the
    window before.
    """
    next_window = np.searchsorted(documents, documents + length)
    # Documents from here on have too few tokens after them.
    last = int(np.searchsorted(documents, tokens - length))
    # Its items become Python integers one by one, not all at once.
    next_indices = next_window.data
    chain, document = [], 0
    while document < last:
        chain.append(document)
        document = next_indices[document]
    return documents[np.array(chain, dtype=np.int64)]
