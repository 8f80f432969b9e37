"""``amlaunch data inspect | verify | peek``: what is in a folder of shards, and whether it is whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from amlaunch.preprocess.errors import Failure
from amlaunch.preprocess.progress import Progress
from amlaunch.preprocess.shards.shard_format import index_path, open_tokens, read_ends, read_header, read_manifest
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import sha256_file


def run(arguments: argparse.Namespace) -> int:
    """Carry out one of the three."""
    found, lines = {"inspect": inspect, "verify": verify, "peek": peek}[arguments.what](arguments)
    print(json.dumps(found, indent=2, ensure_ascii=False) if arguments.json else "\n".join(lines), flush=True)
    return 0


def inspect(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Counts, tokenizer, statistics and shards of a folder; the header of a file."""
    path = Path(arguments.dir)
    if path.is_file():
        return _inspect_file(path)
    whole = read_manifest(path)
    lines = statistics(whole)
    lines += [
        f"source       {_words(whole['source'])}",
        f"options      {_words(whole['options'])}",
        f"created by   {whole['created_by']}",
    ]
    for split, entries in whole["splits"].items():
        lines += [f"{split}:"] * bool(entries)
        lines += [
            f"  {entry['file']}  {entry['tokens']:>13,} tokens  {entry['documents']:>9,} documents  sha256 {entry['sha256'][:16]}"
            for entry in entries
        ]
    return whole, lines


def _inspect_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    header = read_header(path)
    found: dict[str, Any] = {
        "file": str(path),
        "tokens": header.tokens,
        "item_size": header.item_size,
        "documents": header.documents,
    }
    if index_path(path).exists():
        found["documents"] = len(read_ends(path))
    found["sha256"] = sha256_file(path)
    return found, [
        f"{key:<12} {value:,}" if isinstance(value, int) else f"{key:<12} {value}" for key, value in found.items()
    ]


def statistics(whole: dict[str, Any]) -> list[str]:
    """What a manifest says of tokens and documents, in lines; a manifest of an older version says less."""
    lines = [
        f"tokens       {whole['tokens']:,} ({whole['train_tokens']:,} train, {whole['val_tokens']:,} val)",
        f"documents    {whole['documents']:,}, skipped {_words(whole.get('skipped', {})) or 'none'}"
        + (f", repaired {whole['repaired']:,}" if whole.get("repaired") else ""),
    ]
    if whole.get("text_bytes"):
        lines.append(f"text         {whole['text_bytes']:,} bytes, {whole['bytes_per_token']} a token")
    tokenizer = whole["tokenizer"]
    lines.append(
        f"tokenizer    {tokenizer['name']}, {tokenizer['n_vocab']:,} tokens in {whole['item_size']} bytes, fingerprint {tokenizer['fingerprint']}"
    )
    if whole.get("histogram"):
        lines += ["tokens a document:", *histogram_lines(whole["histogram"])]
    errors = whole.get("errors") or []
    return lines + ["left out, being damaged:"] * bool(errors) + [f"  {error}" for error in errors]


def histogram_lines(counts: list[int]) -> list[str]:
    """A bar for each power of two between the first and the last that occurs."""
    occurring = [power for power, count in enumerate(counts) if count]
    most = max(counts)
    return [
        f"  {2**power:>11,} to {2 ** (power + 1) - 1:<11,} {counts[power]:>11,} {'#' * -(-30 * counts[power] // most)}"
        for power in range(occurring[0], occurring[-1] + 1)
    ]


def _words(value: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} {item:,}" if isinstance(item, int) and not isinstance(item, bool) else f"{key} {item}"
        for key, item in value.items()
        if item not in (None, {})
    )


def verify(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Hold every byte of a folder against its manifest. Raises Failure with all that is damaged or missing."""
    from amlaunch.preprocess.stages.verify import find_damage

    folder = Path(arguments.dir)
    whole = read_manifest(folder)
    entries = [entry for listed in whole["splits"].values() for entry in listed]
    progress, done = Progress(say=(lambda text: None) if arguments.json else None), 0
    damaged = []
    for entry in entries:
        progress.update(done, whole["tokens"])
        what = find_damage(folder, SimpleNamespace(**entry), whole["tokenizer"], whole["options"].get("bos", True))
        damaged += [f"{what[0]}: {what[1]}"] if what else []
        done += entry["tokens"]
    for name, noted in whole.get("raw", {}).items():
        if not (folder / name).exists() or sha256_file(folder / name) != noted["sha256"]:
            damaged.append(f"{folder / name}: missing, or its sha256 is not what its writer noted")
    if damaged:
        raise Failure(
            "\n".join(
                ["damaged:", *damaged, "give the command that made the folder again: it redoes just these shards"]
            )
        )
    found = {
        "path": str(folder),
        "shards": len(entries),
        "tokens": whole["tokens"],
        "documents": whole["documents"],
        "whole": True,
    }
    return found, [
        f"{folder}: whole: {len(entries)} shards, {whole['tokens']:,} tokens, {whole['documents']:,} documents"
    ]


class Shards:
    """The shards of one split (or one file) as one stream of documents and tokens."""

    def __init__(self, paths: list[Path], tokens: list[int]):
        self.paths = paths
        self.tokens = np.concatenate([[0], np.cumsum(np.array(tokens, dtype=np.int64))])

    def at(self, token: int, count: int) -> tuple[Path, list[int]]:
        """Up to ``count`` tokens from an offset on, and the shard in which they begin."""
        if not 0 <= token < self.tokens[-1]:
            raise BadInput(f"--token {token}: there are tokens 0 to {int(self.tokens[-1]) - 1:,}")
        first = which = int(np.searchsorted(self.tokens, token, side="right")) - 1
        found: list[int] = []
        while len(found) < count and which < len(self.paths):
            begin = token + len(found) - int(self.tokens[which])
            found += open_tokens(self.paths[which])[begin : begin + count - len(found)].tolist()
            which += 1
        return self.paths[first], found

    def document(self, number: int, documents: list[int]) -> tuple[int, int]:
        """Where a document begins, in tokens of the stream, and how many it has; ``documents`` of each shard."""
        ends = np.cumsum(np.array(documents, dtype=np.int64))
        if not 0 <= number < ends[-1]:
            raise BadInput(f"--document {number}: there are documents 0 to {int(ends[-1]) - 1:,}")
        which = int(np.searchsorted(ends, number, side="right"))
        own = read_ends(self.paths[which]).astype(np.int64)
        local = number - int(ends[which] - documents[which])
        begin = int(own[local - 1]) if local else 0
        return int(self.tokens[which]) + begin, int(own[local]) - begin


def peek(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """The text of a document, or of tokens at an offset."""
    from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer

    path = Path(arguments.dir)
    if path.is_file():
        header = read_header(path)
        shards, documents = Shards([path], [header.tokens]), [header.documents or 0]
        tokenizer = load_tokenizer(arguments.tokenizer or "gpt2")
    else:
        whole = read_manifest(path)
        entries = whole["splits"][arguments.split]
        if not entries:
            raise BadInput(f"{path}: there is nothing in the split {arguments.split}")
        shards = Shards([path / entry["file"] for entry in entries], [entry["tokens"] for entry in entries])
        documents = [entry["documents"] for entry in entries]
        tokenizer = load_tokenizer(arguments.tokenizer or whole["tokenizer"]["name"])
        if tokenizer.fingerprint != whole["tokenizer"]["fingerprint"]:
            raise BadInput(f"{path}: made with another {tokenizer.name} than the one that is here")
    begin, size = arguments.token, None
    if begin is None:
        if not any(documents):
            raise BadInput(f"{path}: it does not say where documents begin; give --token OFFSET")
        begin, size = shards.document(arguments.document or 0, documents)
    shard, ids = shards.at(begin, max(1, arguments.tokens if size is None else min(size, arguments.tokens)))
    text = tokenizer.decode(ids)
    found = {"shard": str(shard), "token": begin, "tokens": len(ids), "document_tokens": size, "ids": ids, "text": text}
    of = f" of the {size:,} of document {arguments.document or 0}" if size is not None else ""
    return found, [f"{shard.name}: {len(ids):,} tokens{of}, from token {begin:,}", text]
