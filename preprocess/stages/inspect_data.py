"""``amlaunch data inspect | verify | peek``: show the contents of a folder of shards, and check it for damage."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from amlaunch.preprocess.errors import ExternalFailure
from amlaunch.preprocess.progress import Progress
from amlaunch.preprocess.shards.shard_format import index_path, open_tokens, read_ends, read_header, read_manifest
from amlaunch.recipes.errors import OK, BadInput
from amlaunch.recipes.files import sha256_file
from amlaunch.recipes.output import counted

HISTOGRAM_WIDTH = 30
"""Characters of the longest bar."""

CommandOutput = tuple[dict[str, Any], list[str]]
"""A command's result as JSON and as lines."""


def run(arguments: argparse.Namespace) -> int:
    """Run ``inspect``, ``verify`` or ``peek``; return the exit code."""
    command = {"inspect": inspect, "verify": verify, "peek": peek}[arguments.what]
    value, lines = command(arguments)
    print(json.dumps(value, indent=2, ensure_ascii=False) if arguments.json else "\n".join(lines), flush=True)
    return OK


def inspect(arguments: argparse.Namespace) -> CommandOutput:
    """Show counts, tokenizer, statistics and shards of a folder, or the header of a file."""
    path = Path(arguments.dir)
    if path.is_file():
        return _inspect_file(path)
    manifest = read_manifest(path)
    lines = [
        *format_statistics(manifest),
        f"source       {_format_fields(manifest['source'])}",
        f"options      {_format_fields(manifest['options'])}",
        f"created by   {manifest['created_by']}",
    ]
    for split, entries in manifest["splits"].items():
        if entries:
            lines.append(f"{split}:")
        lines += [_format_entry(entry) for entry in entries]
    return manifest, lines


def _format_entry(entry: dict[str, Any]) -> str:
    return (
        f"  {entry['file']}  {entry['tokens']:>13,} tokens  {entry['documents']:>9,} documents  "
        f"sha256 {entry['sha256'][:16]}"
    )


def _inspect_file(path: Path) -> CommandOutput:
    header = read_header(path)
    value = {
        "file": str(path),
        "tokens": header.tokens,
        "item_size": header.item_size,
        "documents": len(read_ends(path)) if index_path(path).exists() else header.documents,
        "sha256": sha256_file(path),
    }
    lines = [f"{key:<12} {item:,}" if isinstance(item, int) else f"{key:<12} {item}" for key, item in value.items()]
    return value, lines


def format_statistics(manifest: dict[str, Any]) -> list[str]:
    """Format a manifest's counts of tokens and documents; a manifest of an older version has fewer of them."""
    documents = f"{manifest['documents']:,}, skipped {_format_fields(manifest.get('skipped', {})) or 'none'}"
    if manifest.get("repaired"):
        documents += f", repaired {manifest['repaired']:,}"
    lines = [
        f"tokens       {manifest['tokens']:,} ({manifest['train_tokens']:,} train, {manifest['val_tokens']:,} val)",
        f"documents    {documents}",
    ]
    if manifest.get("text_bytes"):
        lines.append(f"text         {manifest['text_bytes']:,} bytes, {manifest['bytes_per_token']} per token")

    tokenizer = manifest["tokenizer"]
    lines.append(
        f"tokenizer    {tokenizer['name']}, {tokenizer['n_vocab']:,} tokens in {manifest['item_size']} bytes, "
        f"fingerprint {tokenizer['fingerprint']}"
    )
    if manifest.get("histogram"):
        lines += ["tokens per document:", *format_histogram(manifest["histogram"])]
    if manifest.get("errors"):
        lines += ["damaged records, skipped:", *(f"  {error}" for error in manifest["errors"])]
    return lines


def format_histogram(counts: list[int]) -> list[str]:
    """Format a bar for each power of two between the first and the last that occurs."""
    occurring = [power for power, count in enumerate(counts) if count]
    largest = max(counts)
    lines = []
    for power in range(occurring[0], occurring[-1] + 1):
        bar = "#" * -(-HISTOGRAM_WIDTH * counts[power] // largest)
        lines.append(f"  {2**power:>11,} to {2 ** (power + 1) - 1:<11,} {counts[power]:>11,} {bar}")
    return lines


def _format_fields(fields: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_format_value(value)}" for name, value in fields.items() if value not in (None, {}))


def _format_value(value: Any) -> str:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return f"{value:,}" if is_number else f"{value}"


def verify(arguments: argparse.Namespace) -> CommandOutput:
    """Compare every byte of a folder with its manifest. Raises ExternalFailure with all damaged and missing files."""
    from amlaunch.preprocess.stages.verify import find_damage

    folder = Path(arguments.dir)
    manifest = read_manifest(folder)
    tokenizer, bos = manifest["tokenizer"], manifest["options"].get("bos", True)
    entries = [entry for entries in manifest["splits"].values() for entry in entries]
    progress = Progress(log=(lambda text: None) if arguments.json else None)
    done, damaged = 0, []
    for entry in entries:
        progress.update(done, manifest["tokens"])
        damage = find_damage(folder, SimpleNamespace(**entry), tokenizer, bos)
        if damage is not None:
            damaged.append(f"{damage[0]}: {damage[1]}")
        done += entry["tokens"]

    for name, entry in manifest.get("raw", {}).items():
        path = folder / name
        if not path.exists():
            damaged.append(f"{path}: missing")
        elif sha256_file(path) != entry["sha256"]:
            damaged.append(f"{path}: checksum mismatch")
    if damaged:
        hint = "To repair the folder, run the command that made it again; only these shards are rewritten"
        raise ExternalFailure("\n".join([f"{counted(len(damaged), 'damaged or missing file')}:", *damaged, hint]))

    value = {
        "path": str(folder),
        "shards": len(entries),
        "tokens": manifest["tokens"],
        "documents": manifest["documents"],
        "whole": True,
    }
    counts = (
        f"{counted(len(entries), 'shard')}, {manifest['tokens']:,} tokens, {counted(manifest['documents'], 'document')}"
    )
    return value, [f"{folder}: verified: {counts}"]


class ShardSequence:
    """The shards of one split (or one file) as one stream of documents and tokens."""

    def __init__(self, paths: list[Path], tokens: list[int]):
        self.paths = paths
        self.starts = np.concatenate([[0], np.cumsum(np.array(tokens, dtype=np.int64))])
        """First token of each shard; then the total."""

    def read(self, token: int, count: int) -> tuple[Path, list[int]]:
        """Return up to ``count`` tokens from offset ``token`` on, preceded by the shard in which they begin."""
        if not 0 <= token < self.starts[-1]:
            raise BadInput(f"--token {token}: must be 0 to {int(self.starts[-1]) - 1:,}")
        first = shard = int(np.searchsorted(self.starts, token, side="right")) - 1
        tokens: list[int] = []
        while len(tokens) < count and shard < len(self.paths):
            begin = token + len(tokens) - int(self.starts[shard])
            tokens += open_tokens(self.paths[shard])[begin : begin + count - len(tokens)].tolist()
            shard += 1
        return self.paths[first], tokens

    def locate_document(self, number: int, documents: list[int]) -> tuple[int, int]:
        """Return a document's first token in the stream and its length; ``documents``: the count of each shard."""
        document_ends = np.cumsum(np.array(documents, dtype=np.int64))
        if not 0 <= number < document_ends[-1]:
            raise BadInput(f"--document {number}: must be 0 to {int(document_ends[-1]) - 1:,}")
        shard = int(np.searchsorted(document_ends, number, side="right"))
        token_ends = read_ends(self.paths[shard]).astype(np.int64)
        local = number - int(document_ends[shard] - documents[shard])
        begin = int(token_ends[local - 1]) if local else 0
        return int(self.starts[shard]) + begin, int(token_ends[local]) - begin


def peek(arguments: argparse.Namespace) -> CommandOutput:
    """Show the text of a document, or of the tokens at an offset."""
    from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer

    path = Path(arguments.dir)
    if path.is_file():
        header = read_header(path)
        shards, documents = ShardSequence([path], [header.tokens]), [header.documents or 0]
        tokenizer = load_tokenizer(arguments.tokenizer or "gpt2")
    else:
        manifest = read_manifest(path)
        entries = manifest["splits"][arguments.split]
        if not entries:
            raise BadInput(f"{path}: the split {arguments.split} is empty")
        shards = ShardSequence([path / entry["file"] for entry in entries], [entry["tokens"] for entry in entries])
        documents = [entry["documents"] for entry in entries]
        tokenizer = load_tokenizer(arguments.tokenizer or manifest["tokenizer"]["name"])
        if tokenizer.fingerprint != manifest["tokenizer"]["fingerprint"]:
            raise BadInput(
                f"{path}: its tokenizer {manifest['tokenizer']['name']} has fingerprint "
                f"{manifest['tokenizer']['fingerprint']}, but {tokenizer.name} on this machine has "
                f"{tokenizer.fingerprint}; name the matching one with --tokenizer"
            )

    number = arguments.document or 0
    begin, size, count = arguments.token, None, arguments.tokens
    part_of_document = ""
    if begin is None:
        if not any(documents):
            raise BadInput(f"{path}: the file does not say where documents begin; give --token OFFSET")
        begin, size = shards.locate_document(number, documents)
        count = min(size, count)
        part_of_document = f" of document {number} ({size:,} tokens)"

    shard, ids = shards.read(begin, max(1, count))
    text = tokenizer.decode(ids)
    value = {"shard": str(shard), "token": begin, "tokens": len(ids), "document_tokens": size, "ids": ids, "text": text}
    return value, [f"{shard.name}: {len(ids):,} tokens{part_of_document}, from token {begin:,}", text]
