"""The shard format: tokens on disk in the layout that NeMo's, llm.c's and modded-nanogpt's loaders read.

A ``.bin`` file is 256 little-endian int32 (1024 bytes) and then the tokens,
little-endian uint16, or uint32 where the vocabulary does not fit:

====  =========================================================================
int   meaning
====  =========================================================================
0     magic: 20240520 (llm.c, modded-nanogpt); 278895051 (NeMo) for 4-byte tokens
1     version, 1
2     number of tokens
3     bytes a token, 2 or 4 (llm.c leaves it zero: 2)
4     number of documents (others leave it zero: unknown)
====  =========================================================================

Each document is its beginning-of-sequence token (unless the recipe wants none) and then its text. Beside
``x.bin`` lies ``x.idx``: little-endian uint64, one a document, where it ends
(exclusive, in tokens of this shard); document k begins at ``ends[k - 1]``, the
first at 0. ``manifest.json`` lists a folder's shards with counts and digests.

Standard library and numpy only: the trainer imports this module.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import read_json, whole_file

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MAGIC_UINT16 = 20240520
"""llm.c's and modded-nanogpt's."""
MAGIC_SIZED = 278895051
"""NeMo's: the item size stands in the header."""
VERSION = 1
MAX_TOKENS = 2**31 - 1
"""The count is an int32."""
WRITE_TOKENS = 1 << 17
"""That wait until they are written, about."""
MANIFEST = "manifest.json"
MANIFEST_VERSION = 1

Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself."""

    tokens: int
    item_size: int
    """Bytes a token."""
    documents: int | None
    """None where the writer did not count them."""


def token_dtype(n_vocab: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every id below ``n_vocab``."""
    return np.dtype("<u2" if n_vocab <= 2**16 else "<u4")


def header_bytes(header: ShardHeader) -> bytes:
    """The 1024 bytes in front of the tokens."""
    ints = np.zeros(HEADER_INTS, dtype="<i4")
    magic = MAGIC_UINT16 if header.item_size == 2 else MAGIC_SIZED
    ints[:5] = magic, VERSION, header.tokens, header.item_size, header.documents or 0
    return ints.tobytes()


def write_shard(path: Path, documents: Iterable[Tokens], dtype: np.dtype[Any]) -> ShardHeader:
    """Write ``documents`` (each its tokens, BOS first) to ``path`` and their ends beside it.

    Memory does not grow with the shard, but for 8 bytes a document. The token
    file appears whole, then the index; their names are durable with the next file
    that is (the entry that vouches for them). Raises BadInput past 2**31 - 1 tokens.
    """
    ends = array("Q")
    size = written = 0
    waiting: list[memoryview] = []
    with whole_file(path, durable_name=False) as handle:
        handle.write(bytes(HEADER_BYTES))
        for tokens in documents:
            size += len(tokens)
            if size > MAX_TOKENS:
                raise BadInput(f"{path}: a shard holds at most {MAX_TOKENS:,} tokens, and a document goes past that")
            waiting.append(tokens.astype(dtype, copy=False).data)
            ends.append(size)
            if size - written >= WRITE_TOKENS:  # a call of the system a document costs more than the copy
                handle.write(b"".join(waiting))
                waiting.clear()
                written = size
        handle.write(b"".join(waiting))
        header = ShardHeader(size, dtype.itemsize, len(ends))
        handle.seek(0)
        handle.write(header_bytes(header))
    with whole_file(index_path(path), durable_name=False) as handle:
        handle.write(np.frombuffer(ends, dtype=np.uint64).astype("<u8").tobytes())
    return header


def index_path(path: Path) -> Path:
    """Where the document ends of a shard lie."""
    return path.with_suffix(".idx")


def read_header(path: Path) -> ShardHeader:
    """The header of a shard in our layout, llm.c's or NeMo's, checked against the file's size.

    Raises BadInput for a file that is missing, empty, foreign, truncated or too long.
    """
    try:
        with open(path, "rb") as handle:
            head = handle.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    if len(head) < HEADER_BYTES:
        raise BadInput(f"{path}: {size} bytes are too few for a token shard (the header alone is {HEADER_BYTES})")
    header = _parse(path, np.frombuffer(head, dtype="<i4"))
    expected = HEADER_BYTES + header.tokens * header.item_size
    if size != expected:
        how = "truncated" if size < expected else "longer than its header says"
        raise BadInput(
            f"{path}: {how}: {size} bytes on disk, {expected} expected for {header.tokens} tokens of {header.item_size} bytes"
        )
    return header


def _parse(path: Path, ints: npt.NDArray[Any]) -> ShardHeader:
    magic, version, tokens, item_size, documents = (int(value) for value in ints[:5])
    if magic not in (MAGIC_UINT16, MAGIC_SIZED):
        raise BadInput(
            f"{path}: not a token shard: begins with {magic}, not with {MAGIC_UINT16} (llm.c) or {MAGIC_SIZED} (NeMo)"
        )
    if version != VERSION:
        raise BadInput(f"{path}: a token shard of version {version}; this reads version {VERSION}")
    if item_size == 0 and magic == MAGIC_UINT16:
        item_size = 2
    if item_size not in (2, 4):
        raise BadInput(f"{path}: says {item_size} bytes a token; 2 or 4 expected")
    if tokens <= 0:
        raise BadInput(f"{path}: its header counts {tokens} tokens: empty, or its writer was killed")
    return ShardHeader(tokens, item_size, documents if documents > 0 else None)


def open_tokens(path: Path) -> np.memmap[Any, Any]:
    """The tokens of a shard, shape (tokens,), uint16 or uint32, mapped and read-only. Raises BadInput as read_header."""
    header = read_header(path)
    return np.memmap(path, dtype=f"<u{header.item_size}", mode="r", offset=HEADER_BYTES, shape=(header.tokens,))


def read_ends(path: Path) -> npt.NDArray[np.uint64]:
    """Where each document of the shard at ``path`` ends (exclusive, in tokens), checked against its header.

    Raises BadInput where the index is missing or is not this shard's.
    """
    header, index = read_header(path), index_path(path)
    try:
        raw = index.read_bytes()
    except OSError as error:
        raise BadInput(
            f"{index}: cannot be read ({error.strerror}); it holds the document ends of {path.name}"
        ) from None
    if len(raw) % 8:
        raise BadInput(f"{index}: truncated: {len(raw)} bytes are no whole number of uint64")
    ends = np.frombuffer(raw, dtype="<u8")
    grows = len(ends) > 0 and bool(np.all(ends[1:] > ends[:-1])) and int(ends[0]) > 0
    if not grows or int(ends[-1]) != header.tokens or header.documents not in (None, len(ends)):
        raise BadInput(
            f"{index}: does not belong to {path.name}: its {len(ends)} document ends do not fill {header.tokens} tokens"
        )
    return ends


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of shards (see :func:`preprocess.verify.manifest`).

    ``splits`` maps train and val to lists of ``{"file", "tokens", "documents",
    "bytes", "sha256", …}`` in reading order; ``tokenizer`` holds name, n_vocab,
    bos, eot and fingerprint. Raises BadInput where there is none, or another version's.
    """
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except ValueError as error:
        raise BadInput(f"{error}; remove it and run the verify stage again") from None
    if manifest is None:
        raise BadInput(
            f"{path}: no such file: run the preprocess and verify stages first, or name the .bin files themselves"
        )
    if not isinstance(manifest, dict) or manifest.get("version") != MANIFEST_VERSION or "splits" not in manifest:
        raise BadInput(f"{path}: not a manifest of version {MANIFEST_VERSION}")
    return manifest
