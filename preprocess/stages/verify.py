"""The verify stage: check every byte of every shard, then write one manifest over all parts.

A budget becomes exact here, because only now are the counts of all parts known. The part in which it ends is cut to the
token, and everything after it is removed; in the rare case that the elements stopped too early, the missing parts are
made here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from amlaunch.preprocess.errors import ExternalFailure
from amlaunch.preprocess.progress import Progress
from amlaunch.preprocess.shards.nanogpt_layout import write_raw
from amlaunch.preprocess.shards.output_folder import (
    MAX_LISTED_ERRORS,
    FinishedPart,
    OutputDir,
    ShardEntry,
    part_number,
    read_entry,
    read_part,
)
from amlaunch.preprocess.shards.shard_format import (
    MANIFEST_VERSION,
    index_path,
    open_tokens,
    read_ends,
    read_header,
    token_dtype,
)
from amlaunch.preprocess.stages.element import different_origin_message, list_changes, open_context, skipped_records
from amlaunch.preprocess.stages.part_writer import make_part, remove_shard
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import fingerprint, read_json, read_object, sha256_file, write_json
from amlaunch.recipes.format.schema import Preprocess
from amlaunch.recipes.format.targets import TargetPolicy
from amlaunch.recipes.output import counted
from amlaunch.recipes.version import VERSION

CHUNK_TOKENS = 1 << 22
"""Tokens checked at once."""
MAX_LISTED_NAMES = 20
"""Elements or shards that a message names."""


class IncompleteOutput(ExternalFailure):
    """A part is missing or a shard is damaged; the message says what to run again."""


def verify(options: Preprocess, out: Path, progress: Progress, policy: TargetPolicy | None = None) -> dict[str, Any]:
    """Check the shards of all elements in ``out``, write ``manifest.json`` and return it.

    Raises IncompleteOutput with the names of unfinished elements and damaged files. Damaged files are renamed to
    ``*.damaged`` and their element counts as unfinished, so that running it again rewrites only them. Raises BadInput
    if the parts have different origins or hold nothing to train on, or if the folder has shards of no part.
    """
    folder = OutputDir(out)
    count = check_origins(folder, options)
    parts = collect_parts(folder, options, count, progress, policy)
    check_damage(folder, parts, progress)
    remove_surplus(folder, parts, count)

    manifest = build_manifest(parts)
    if not manifest["splits"]["train"]:
        raise BadInput(f"{out}: {_nothing_to_train_on(manifest)}")
    if manifest["val_tokens"] < options.val_tokens:
        progress.log(
            f"{out}: the validation split has {manifest['val_tokens']:,} tokens, fewer than val_tokens "
            f"{options.val_tokens:,}, because the documents at the front of the source hold no more"
        )
    if options.format == "raw":
        manifest["raw"] = write_raw(folder, manifest)
    if _read_or_none(folder.manifest) != manifest:
        write_json(folder.manifest, manifest)
    for number in range(count):
        folder.lock(number).unlink(missing_ok=True)
    return manifest


def _nothing_to_train_on(manifest: dict[str, Any]) -> str:
    if manifest["val_tokens"]:
        return (
            f"preprocess.val_tokens: all {manifest['val_tokens']:,} tokens went to validation. Lower val_tokens, or "
            f"provide more text"
        )
    if not manifest["skipped"]:
        return "no document to train on: the source is empty"
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in manifest["skipped"].items())
    first_error = f"; the first: {manifest['errors'][0]}" if manifest["errors"] else ""
    return f"no document to train on: all records were skipped ({skipped}{first_error})"


def check_origins(folder: OutputDir, options: Preprocess) -> int:
    """Return the number of parts of the source. Raises BadInput if elements differ in source, tokenizer or options."""
    origins = {path: read_object(path) for path in folder.origins()}
    if not origins:
        raise IncompleteOutput(_unfinished_message(folder, options, range(options.elements)))

    first = next(iter(origins.values()))
    current_options = {name: getattr(options, name) for name in first.get("options", {})}
    expected = {**first, "options": current_options}
    for path, origin in origins.items():
        if changes := list_changes(origin, expected):
            element = int(path.stem.rpartition("-")[2])
            raise BadInput(different_origin_message(folder.root, f"{folder.root}: element {element} was", changes))
    return int(first.get("parts", 0))


def collect_parts(
    folder: OutputDir, options: Preprocess, count: int, progress: Progress, policy: TargetPolicy | None
) -> list[FinishedPart]:
    """Return the parts of the output, in order; they hold exactly the budget if the source has as many tokens.

    Raises IncompleteOutput with the unfinished elements or the missing parts.
    """
    parts: list[FinishedPart] = []
    tokens_left = options.max_tokens
    context = engine = None
    for number in range(count):
        if tokens_left == 0:
            return parts
        part = read_part(folder, number)
        has_files = part is not None and part.has_complete_files(folder.root)
        if part is None or not has_files or not part.matches_budget(tokens_left):
            if not has_files or tokens_left is None:
                check_elements_finished(folder, options, number)
            if context is None:
                context = open_context(options, folder.root, progress.log, policy)
                engine = context.open_engine()
                check_origin_unchanged(folder, context.origin)
            if part is None:
                progress.log(
                    f"part {number}: needed for the budget after all; making up to {tokens_left:,} tokens of it"
                )
            else:
                progress.log(f"part {number}: cutting it to the {tokens_left:,} tokens left of the budget")
            assert engine is not None
            part = make_part(context, engine, number, tokens_left)
        parts.append(part)
        tokens_left = None if tokens_left is None else tokens_left - part.cursor.tokens

    if tokens_left:
        tokens = sum(part.cursor.tokens for part in parts)
        progress.log(f"{folder.root}: the source has only {tokens:,} of max_tokens {options.max_tokens:,}")
    return parts


def check_origin_unchanged(folder: OutputDir, origin: dict[str, Any]) -> None:
    """Raise BadInput if the source or the tokenizer has changed since the elements ran."""
    existing = read_object(next(folder.origins()))
    if changes := list_changes(existing, origin):
        raise BadInput(different_origin_message(folder.root, f"{folder.root}: its shards were", changes))


def check_elements_finished(folder: OutputDir, options: Preprocess, part: int) -> None:
    """Raise IncompleteOutput for a missing part, unless all elements finished and the budget did not need it."""
    records = [read_object(folder.element(index)) for index in range(options.elements)]
    unfinished = [index for index, record in enumerate(records) if record.get("elements") != options.elements]
    if unfinished:
        raise IncompleteOutput(_unfinished_message(folder, options, unfinished))

    owner = next((record["element"] for record in records if part in record.get("parts", [])), None)
    if owner is not None or options.max_tokens is None:
        mark_unfinished(folder, part)
        element = "" if owner is None else f" (element {owner})"
        raise IncompleteOutput(
            f"{folder.root}: shards of part {part}{element} are missing. Run the element again; only "
            "these are rewritten"
        )


def _unfinished_message(folder: OutputDir, options: Preprocess, unfinished: Sequence[int]) -> str:
    return (
        f"{folder.root}: {len(unfinished)} of {counted(options.elements, 'element')} not finished: "
        f"{_shorten(list(map(str, unfinished)))}. Run them first: "
        f"python -m amlaunch.preprocess element RECIPE --index {unfinished[0]} --out {folder.root}"
    )


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:MAX_LISTED_NAMES]) + (", …" if len(names) > MAX_LISTED_NAMES else "")


def check_damage(folder: OutputDir, parts: Sequence[FinishedPart], progress: Progress) -> None:
    """Set damaged shards aside. Raises IncompleteOutput with all shards that differ from their entries."""
    total, done = sum(part.cursor.tokens for part in parts), 0
    damaged = []
    for part in parts:
        for entry in part.shards:
            progress.update(done, total)
            damage = find_damage(folder.root, entry, part.origin["tokenizer"], part.origin["options"]["bos"])
            if damage is not None:
                path, problem = damage
                set_aside(folder, part.number, entry, path)
                damaged.append(f"{path.name}: {problem}")
            done += entry.tokens
    if damaged:
        raise IncompleteOutput(
            f"{folder.root}: damaged: {'; '.join(damaged)}. The damaged files are kept as *.damaged. Run the same "
            f"command again; only these shards are rewritten"
        )


def find_damage(root: Path, entry: Any, tokenizer: dict[str, Any], bos: bool) -> tuple[Path, str] | None:
    """Return the first file of a shard that differs from its entry, and the problem; None if there is no damage.

    ``entry``: a ShardEntry, or an entry of a manifest. Checks digests first; then counts, document starts and token
    ids, in case the entry itself is wrong.
    """
    path = root / entry.file
    for file, digest in ((path, entry.sha256), (index_path(path), entry.idx_sha256)):
        if not file.exists():
            return file, "missing"
        if sha256_file(file) != digest:
            return file, "checksum mismatch"
    problem = find_wrong_content(path, entry, tokenizer, bos)
    return (path, problem) if problem else None


def find_wrong_content(path: Path, entry: Any, tokenizer: dict[str, Any], bos: bool) -> str | None:
    """Return the problem with the tokens or document ends of a readable shard; None if there is none."""
    try:
        header, ends = read_header(path), read_ends(path)
    except BadInput as error:
        return str(error)
    if (header.tokens, header.documents, len(ends)) != (entry.tokens, entry.documents, entry.documents):
        return (
            f"expected {entry.tokens} tokens in {counted(entry.documents, 'document')}, got "
            f"{header.tokens} in {header.documents}"
        )

    tokens = open_tokens(path)
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    if bos and not np.all(tokens[starts] == tokenizer["bos"]):
        return "a document does not begin with the beginning-of-sequence token"

    largest = max(int(tokens[begin : begin + CHUNK_TOKENS].max()) for begin in range(0, len(tokens), CHUNK_TOKENS))
    if largest >= tokenizer["n_vocab"]:
        return f"token id {largest} is outside the vocabulary of {tokenizer['n_vocab']} tokens"
    return None


def set_aside(folder: OutputDir, part: int, entry: ShardEntry, path: Path) -> None:
    """Rename a damaged file to ``*.damaged`` and make the next run of the part's element rewrite its shard.

    The other shards stay valid.
    """
    (folder.root / entry.file).with_suffix(".json").unlink(missing_ok=True)
    mark_unfinished(folder, part)
    if path.exists():
        path.replace(path.with_name(path.name + ".damaged"))


def mark_unfinished(folder: OutputDir, part: int) -> None:
    """Make a part and its element count as unfinished, and remove the manifest so that no trainer reads the folder."""
    folder.manifest.unlink(missing_ok=True)
    folder.part(part).unlink(missing_ok=True)
    for path in folder.root.glob("element-*.json"):
        if part in read_object(path).get("parts", [part]):
            path.unlink(missing_ok=True)


def remove_surplus(folder: OutputDir, parts: Sequence[FinishedPart], count: int) -> None:
    """Remove everything that elements made beyond the budget, and partial files of killed processes.

    Raises BadInput with the names of shards that belong to no part.
    """
    known = {entry.file for part in parts for entry in part.shards}
    origin = fingerprint(parts[0].origin) if parts else ""
    foreign = []
    for name in sorted(folder.shards_on_disk() - known):
        path, number = folder.root / name, part_number(name)
        entry = read_entry(path)
        is_beyond_budget = len(parts) <= number < count
        if is_beyond_budget and (entry is None or entry.origin == origin):
            folder.part(number).unlink(missing_ok=True)
            remove_shard(path)
        else:
            foreign.append(name)

    # Records of parts beyond the budget that have no shard.
    for number in range(len(parts), count):
        folder.part(number).unlink(missing_ok=True)
    for partial in folder.temporary_files():
        partial.unlink(missing_ok=True)
    if foreign:
        raise BadInput(
            f"{folder.root} holds shards that no element of this recipe made: {_shorten(foreign)}. Remove them, or set "
            f"another preprocess.output_dir"
        )


def build_manifest(parts: Sequence[FinishedPart]) -> dict[str, Any]:
    """Return the manifest of finished parts; see :func:`~amlaunch.preprocess.shards.shard_format.read_manifest`."""
    entries = [entry for part in parts for entry in part.shards]
    origin = parts[0].origin
    tokens = sum(entry.tokens for entry in entries)
    text_bytes = sum(entry.text_bytes for entry in entries)
    histograms = zip_longest(*(entry.histogram for entry in entries), fillvalue=0)
    return {
        "version": MANIFEST_VERSION,
        "created_by": f"amlaunch {VERSION}",
        "tokenizer": origin["tokenizer"],
        "item_size": token_dtype(origin["tokenizer"]["n_vocab"]).itemsize,
        "tokens": tokens,
        "train_tokens": sum(part.cursor.train for part in parts),
        "val_tokens": sum(part.cursor.val for part in parts),
        "documents": sum(entry.documents for entry in entries),
        "skipped": skipped_records(parts),
        "repaired": sum(entry.repaired for entry in entries),
        "text_bytes": text_bytes,
        "bytes_per_token": round(text_bytes / tokens, 3) if tokens else None,
        "histogram": [sum(column) for column in histograms],
        "errors": list(listed_errors(parts))[:MAX_LISTED_ERRORS],
        "source": origin["source"],
        "options": {**origin["options"], "parts": origin["parts"]},
        "fingerprint": fingerprint([entry.sha256 for entry in entries]),
        "splits": {
            split: [_manifest_entry(entry) for entry in entries if entry.split == split] for split in ("train", "val")
        },
    }


def listed_errors(parts: Sequence[FinishedPart]) -> Iterator[str]:
    """Yield the messages of the damaged records that the parts list, in order."""
    for part in parts:
        for entry in part.shards:
            yield from entry.errors
        yield from part.errors


def _manifest_entry(entry: ShardEntry) -> dict[str, Any]:
    names = ("file", "tokens", "documents", "bytes", "sha256", "idx_sha256", "source")
    return {name: getattr(entry, name) for name in names}


def _read_or_none(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError:
        return None


def verify_result(manifest: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return the contents of the stage's ``result.json``; every shard is an output of it."""
    folder = OutputDir(out.absolute())
    shards = [folder.root / entry["file"] for entries in manifest["splits"].values() for entry in entries]
    raw_files = [folder.root / name for name in manifest.get("raw", {})]
    outputs = [folder.manifest, *shards, *map(index_path, shards), *raw_files]
    names = ("tokens", "train_tokens", "val_tokens", "documents", "skipped")
    return {name: manifest[name] for name in names} | {
        "max_tokens": manifest["options"]["max_tokens"],
        "shards": len(shards),
        "outputs": {str(path): path.stat().st_size for path in outputs},
    }
