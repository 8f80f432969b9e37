"""Every byte of every shard checked against what its writer said, then one manifest over all elements."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.element import differences
from preprocess.failure import Failure
from preprocess.parts import OutputDir, Part, ShardEntry, read_part
from preprocess.progress import Progress
from preprocess.shards import MANIFEST_VERSION, index_path, open_tokens, read_ends, read_header, token_dtype
from recipes.errors import BadInput
from recipes.files import fingerprint, read_json, sha256_file, write_json
from recipes.schema import Preprocess
from recipes.version import VERSION

CHUNK = 1 << 22
"""Tokens looked at in one go."""


class NotWhole(Failure):
    """A part is missing or a shard is damaged; the message says which element to run again."""


def verify(options: Preprocess, out: Path, progress: Progress) -> dict[str, Any]:
    """Check the shards of all elements in ``out``, write ``manifest.json`` and return it.

    Raises NotWhole, naming them, for elements that are not finished and files
    that are damaged: these are renamed to ``*.damaged`` and their element
    counts as unfinished, so that running it again redoes just them. Raises
    BadInput where the elements are not of one origin, or hold nothing to train on.
    """
    folder = OutputDir(out)
    parts = finished_parts(folder, options.elements)
    check_one_origin(folder, parts, options)
    damaged = []
    for part, entry in _counted(parts, progress):
        if (what := find_damage(folder, entry, part.origin)) is not None:
            path, problem = what
            set_aside(folder, part.element, entry, path)
            damaged.append(f"{path.name} (element {part.element}): {problem}")
    if damaged:
        raise NotWhole(
            f"{out}: damaged: {'; '.join(damaged)}. What was there is kept as *.damaged; run the element again, "
            f"it redoes just the shard: amlaunch with the same recipe, or python -m preprocess element RECIPE --index I --out {out}"
        )
    whole = manifest(parts)
    if not whole["splits"]["train"]:
        raise BadInput(f"{out}: {_nothing_to_train_on(whole['val_tokens'])}")
    if _present(folder.manifest) != whole:
        write_json(folder.manifest, whole)
    return whole


def _nothing_to_train_on(val_tokens: int) -> str:
    if not val_tokens:
        return "no element found a document to train on: the source is empty"
    return f"preprocess.val_tokens: all {val_tokens:,} tokens went to validation: lower val_tokens, or give more text"


def finished_parts(folder: OutputDir, elements: int) -> list[Part]:
    """All parts in element order. Raises NotWhole with the elements that have none."""
    parts = [read_part(folder, index) for index in range(elements)]
    missing = [str(index) for index, part in enumerate(parts) if part is None]
    if missing:
        names = ", ".join(missing[:20]) + (", …" if len(missing) > 20 else "")
        raise NotWhole(
            f"{folder.root}: {len(missing)} of {elements} elements are not finished: {names}. Run them first: "
            f"python -m preprocess element RECIPE --index {missing[0]} --out {folder.root}"
        )
    return [part for part in parts if part is not None]


def check_one_origin(folder: OutputDir, parts: list[Part], options: Preprocess) -> None:
    """Raise BadInput where elements were made from different things, or with other options than these."""
    here = {name: getattr(options, name) for name in parts[0].origin["options"]}
    expected = {**parts[0].origin, "options": here}
    for part in parts:
        if differing := differences(part.origin, expected):
            raise BadInput(
                f"{folder.root}: element {part.element} was made from something else: {'; '.join(differing)}. "
                f"Remove the folder, or choose another preprocess.output_dir"
            )


def _counted(parts: list[Part], progress: Progress) -> Iterator[tuple[Part, ShardEntry]]:
    total, done = sum(part.cursor.tokens for part in parts), 0
    for part in parts:
        for entry in part.shards:
            progress.update(done, total)
            yield part, entry
            done += entry.tokens


def find_damage(folder: OutputDir, entry: ShardEntry, origin: dict[str, Any]) -> tuple[Path, str] | None:
    """The first file of a shard that is not as its entry says, and how; None where all is well.

    Digests first; then counts, document starts and token ids, in case the entry itself is wrong.
    """
    path = folder.root / entry.file
    for file, digest in ((path, entry.sha256), (index_path(path), entry.idx_sha256)):
        if not file.exists():
            return file, "missing"
        if sha256_file(file) != digest:
            return file, "its sha256 is not what its writer noted"
    problem = wrong_content(path, entry, origin["tokenizer"])
    return (path, problem) if problem else None


def wrong_content(path: Path, entry: ShardEntry, tokenizer: dict[str, Any]) -> str | None:
    """What is wrong with tokens and document ends of a readable shard; None where nothing is."""
    try:
        header, ends = read_header(path), read_ends(path)
    except BadInput as error:
        return str(error)
    if (header.tokens, header.documents, len(ends)) != (entry.tokens, entry.documents, entry.documents):
        return (
            f"{header.tokens} tokens in {header.documents} documents, not the {entry.tokens} in {entry.documents} noted"
        )
    tokens = open_tokens(path)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    if not np.all(tokens[starts] == tokenizer["bos"]):
        return "a document does not begin with the beginning-of-sequence token"
    top = max(int(tokens[at : at + CHUNK].max()) for at in range(0, len(tokens), CHUNK))
    return f"token id {top} is beyond the vocabulary" if top >= tokenizer["n_vocab"] else None


def set_aside(folder: OutputDir, element: int, entry: ShardEntry, path: Path) -> None:
    """Have the element's next run redo this shard; the shards behind it stay valid."""
    folder.part(element).unlink(missing_ok=True)
    (folder.root / entry.file).with_suffix(".json").unlink(missing_ok=True)
    folder.manifest.unlink(missing_ok=True)
    if path.exists():
        path.replace(path.with_name(path.name + ".damaged"))


def manifest(parts: list[Part]) -> dict[str, Any]:
    """What the trainer needs to know of the finished elements; see :func:`preprocess.shards.read_manifest`."""
    entries = [entry for part in parts for entry in part.shards]
    skipped: dict[str, int] = {}
    for part in parts:
        for reason, count in part.cursor.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + count
    origin = parts[0].origin
    return {
        "version": MANIFEST_VERSION,
        "created_by": f"amlaunch {VERSION}",
        "tokenizer": origin["tokenizer"],
        "item_size": token_dtype(origin["tokenizer"]["n_vocab"]).itemsize,
        "tokens": sum(entry.tokens for entry in entries),
        "train_tokens": sum(part.cursor.train for part in parts),
        "val_tokens": sum(part.cursor.val for part in parts),
        "documents": sum(entry.documents for entry in entries),
        "skipped": skipped,
        "source": origin["source"],
        "options": origin["options"],
        "fingerprint": fingerprint([entry.sha256 for entry in entries]),
        "splits": {split: [_listed(entry) for entry in entries if entry.split == split] for split in ("train", "val")},
    }


def _listed(entry: ShardEntry) -> dict[str, Any]:
    names = ("file", "tokens", "documents", "bytes", "sha256", "idx_sha256")
    return {name: getattr(entry, name) for name in names}


def _present(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError:
        return None


def result(whole: dict[str, Any], out: Path) -> dict[str, Any]:
    """What the stage says of itself in ``result.json``."""
    path = OutputDir(out.absolute()).manifest
    shards = sum(len(entries) for entries in whole["splits"].values())
    names = ("tokens", "train_tokens", "val_tokens", "documents", "skipped")
    return {name: whole[name] for name in names} | {"shards": shards, "outputs": {str(path): path.stat().st_size}}
