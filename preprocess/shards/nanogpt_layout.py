"""nanoGPT's layout: one headerless file of tokens per split, written beside the shards."""

from __future__ import annotations

import hashlib
from typing import Any

from amlaunch.preprocess.shards.output_folder import OutputDir
from amlaunch.preprocess.shards.shard_format import HEADER_BYTES
from amlaunch.recipes.files import atomic_file

CHUNK_BYTES = 1 << 22


def write_raw(folder: OutputDir, manifest: dict[str, Any]) -> dict[str, Any]:
    """Write ``train.bin`` and ``val.bin``, the concatenated tokens of each split; return their sizes and digests."""
    return {
        f"{split}.bin": _concatenate(folder, f"{split}.bin", entries)
        for split, entries in manifest["splits"].items()
        if entries
    }


def _concatenate(folder: OutputDir, name: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with atomic_file(folder.root / name) as handle:
        for entry in entries:
            with open(folder.root / entry["file"], "rb") as shard:
                shard.seek(HEADER_BYTES)
                while chunk := shard.read(CHUNK_BYTES):
                    handle.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}
