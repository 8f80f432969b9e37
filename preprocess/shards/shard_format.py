"""The shard format: tokens on disk in the layout that the loaders of NeMo, llm.c and modded-nanogpt read.

A ``.bin`` file is 256 little-endian int32 (1024 bytes) followed by the tokens, little-endian uint16, or uint32 if the
vocabulary needs it:

====  =========================================================================
int   meaning
====  =========================================================================
0     magic: 20240520 (llm.c, modded-nanogpt); 278895051 (NeMo) for 4-byte tokens
1     version, 1
2     number of tokens
3     bytes per token, 2 or 4 (llm.c leaves it zero: 2)
4     number of documents (others leave it zero: unknown)
====  =========================================================================

Each document is its beginning-of-sequence token (unless the recipe turns it off) followed by its text. ``x.idx`` beside
``x.bin`` holds one little-endian uint64 per document: its end (exclusive, in tokens of this shard). Document k begins
at ``ends[k - 1]``, the first at 0. ``manifest.json`` lists the shards of a folder with counts and digests.

Standard library and numpy only: the trainer imports this module.
"""

from __future__ import annotations

import errno
import resource
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import atomic_file, read_json

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAGIC_UINT16 = 20240520
"""Magic of llm.c and modded-nanogpt."""
MAGIC_SIZED = 278895051
"""Magic of NeMo, whose header states the bytes per token."""
VERSION = 1
MAX_TOKENS = 2**31 - 1
"""Per shard: the header counts tokens in an int32."""
WRITE_BUFFER_TOKENS = 1 << 17
"""Tokens that are buffered before a write, approximately."""
INDEX_ITEM_BYTES = 8
MANIFEST = "manifest.json"
MANIFEST_VERSION = 1

Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class ShardHeader:
    """The contents of a shard's header."""

    tokens: int
    item_size: int
    """Bytes per token."""
    documents: int | None
    """None if the writer did not count them."""


def token_dtype(n_vocab: int) -> np.dtype[Any]:
    """Return the smaller of uint16 and uint32 that holds every id below ``n_vocab``."""
    return np.dtype("<u2" if n_vocab <= 2**16 else "<u4")


def header_bytes(header: ShardHeader) -> bytes:
    """Return the 1024 bytes that precede the tokens."""
    ints = np.zeros(HEADER_INTS, dtype="<i4")
    magic = MAGIC_UINT16 if header.item_size == 2 else MAGIC_SIZED
    ints[:5] = magic, VERSION, header.tokens, header.item_size, header.documents or 0
    return ints.tobytes()


def write_shard(path: Path, documents: Iterable[Tokens], dtype: np.dtype[Any]) -> ShardHeader:
    """Write ``documents`` (the tokens of each, BOS first) to ``path`` and their ends beside it.

    Memory does not grow with the shard, apart from 8 bytes per document. The token file appears atomically, then the
    index; their names become durable with the next durable file (the shard's entry). Raises BadInput above 2**31 - 1
    tokens.
    """
    ends = array("Q")
    size = written = 0
    buffered: list[memoryview] = []
    with atomic_file(path, durable_name=False) as handle:
        handle.write(bytes(HEADER_BYTES))
        for tokens in documents:
            size += len(tokens)
            if size > MAX_TOKENS:
                raise BadInput(
                    f"{path}: a shard holds at most {MAX_TOKENS:,} tokens, and a document is longer. "
                    f"Split or exclude that document"
                )
            buffered.append(tokens.astype(dtype, copy=False).data)
            ends.append(size)

            # A system call per document would cost more than the copy that join makes.
            if size - written >= WRITE_BUFFER_TOKENS:
                handle.write(b"".join(buffered))
                buffered.clear()
                written = size

        handle.write(b"".join(buffered))
        header = ShardHeader(size, dtype.itemsize, len(ends))
        handle.seek(0)
        handle.write(header_bytes(header))

    with atomic_file(index_path(path), durable_name=False) as handle:
        handle.write(np.frombuffer(ends, dtype=np.uint64).astype("<u8").tobytes())
    return header


def index_path(path: Path) -> Path:
    """Return the path of a shard's index, which holds the document ends."""
    return path.with_suffix(".idx")


def read_header(path: Path) -> ShardHeader:
    """Read the header of a shard in our layout, llm.c's or NeMo's, and check it against the file size.

    Raises BadInput if the file is missing, empty, truncated, too long or not a shard.
    """
    try:
        with open(path, "rb") as handle:
            header_data = handle.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None

    if len(header_data) < HEADER_BYTES:
        raise BadInput(f"{path}: {size} bytes are too few for a token shard (the header alone is {HEADER_BYTES})")
    header = _parse_header(path, np.frombuffer(header_data, dtype="<i4"))

    expected = HEADER_BYTES + header.tokens * header.item_size
    if size != expected:
        problem = "truncated" if size < expected else "longer than its header says"
        raise BadInput(
            f"{path}: {problem}: expected {expected} bytes ({header.tokens} tokens of {header.item_size} "
            f"bytes), got {size}"
        )
    return header


def _parse_header(path: Path, ints: npt.NDArray[Any]) -> ShardHeader:
    magic, version, tokens, item_size, documents = (int(value) for value in ints[:5])
    if magic not in (MAGIC_UINT16, MAGIC_SIZED):
        raise BadInput(
            f"{path}: not a token shard: expected magic number {MAGIC_UINT16} (llm.c) or {MAGIC_SIZED} (NeMo), "
            f"got {magic}"
        )
    if version != VERSION:
        raise BadInput(f"{path}: expected shard format version {VERSION}, got {version}")

    if item_size == 0 and magic == MAGIC_UINT16:
        item_size = 2
    if item_size not in (2, 4):
        raise BadInput(f"{path}: expected 2 or 4 bytes per token in its header, got {item_size}")
    if tokens <= 0:
        raise BadInput(f"{path}: its header counts {tokens} tokens: the shard is empty or its writer was killed")
    return ShardHeader(tokens, item_size, documents if documents > 0 else None)


def open_tokens(path: Path) -> np.memmap[Any, Any]:
    """Map the tokens of a shard: shape (tokens,), uint16 or uint32, read-only. Raises BadInput like read_header."""
    header = read_header(path)
    return map_file(path, f"<u{header.item_size}", HEADER_BYTES, header.tokens)


def map_file(path: Path, dtype: str, offset: int = 0, items: int | None = None) -> np.memmap[Any, Any]:
    """Map a file read-only, from ``offset`` bytes on; ``items`` None: all of it.

    Each map keeps a descriptor, so the process' soft limit is raised when it is reached. Raises BadInput at the hard
    limit.
    """
    shape = None if items is None else (items,)
    try:
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
    except OSError as error:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if error.errno != errno.EMFILE:
            raise
        if soft == hard:
            raise BadInput(
                f"{path}: too many open files. Each shard needs a descriptor, and the limit is {hard} (ulimit -Hn); "
                "have it raised, or make larger shards (preprocess.shard_tokens)"
            ) from None
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return map_file(path, dtype, offset, items)


def read_ends(path: Path) -> npt.NDArray[np.uint64]:
    """Read the end of each document of the shard at ``path`` (exclusive, in tokens), checked against its header.

    Raises BadInput if the index is missing or belongs to another shard.
    """
    header, index = read_header(path), index_path(path)
    try:
        raw = index.read_bytes()
    except OSError as error:
        raise BadInput(
            f"{index}: cannot be read ({error.strerror}); it holds the document ends of {path.name}"
        ) from None
    if len(raw) % INDEX_ITEM_BYTES:
        raise BadInput(f"{index}: truncated: {len(raw)} bytes is not a multiple of {INDEX_ITEM_BYTES} (uint64)")

    ends = np.frombuffer(raw, dtype="<u8")
    ascending = len(ends) > 0 and int(ends[0]) > 0 and bool(np.all(ends[1:] > ends[:-1]))
    if not ascending or int(ends[-1]) != header.tokens or header.documents not in (None, len(ends)):
        raise BadInput(
            f"{index}: does not belong to {path.name}: its {len(ends)} document ends do not match the shard's "
            f"{header.tokens} tokens"
        )
    return ends


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a folder of shards (see :func:`amlaunch.preprocess.stages.verify.build_manifest`).

    ``splits`` maps train and val to lists of ``{"file", "tokens", "documents", "bytes", "sha256", …}`` in reading
    order; ``tokenizer`` holds name, n_vocab, bos, eot and fingerprint. Raises BadInput if there is no manifest, or if
    it has another version.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except ValueError as error:
        raise BadInput(f"{error}; remove it and run the verify stage again") from None
    if manifest is None:
        raise BadInput(
            f"{path}: no such file. Run the preprocess and verify stages first, or set "
            "dataset.file_pattern to .bin files"
        )
    if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION or "splits" not in manifest:
        raise BadInput(
            f"{path}: not a manifest of version {MANIFEST_VERSION}; run the preprocess and verify stages again"
        )
    return manifest
