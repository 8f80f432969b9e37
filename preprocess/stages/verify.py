"""Every byte of every shard checked against what its writer said, then one manifest over all parts.

Here a budget becomes exact: only now are the counts of all parts known. The
part in which it ends is cut to the token, and what lies behind it goes; in the
rare case that the elements stopped too early, the parts that are missing are
made here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from amlaunch.preprocess.errors import Failure
from amlaunch.preprocess.progress import Progress
from amlaunch.preprocess.shards.nanogpt_layout import write_raw
from amlaunch.preprocess.shards.output_folder import ERRORS_LISTED, OutputDir, Part, ShardEntry, read_entry, read_part
from amlaunch.preprocess.shards.shard_format import (
    MANIFEST_VERSION,
    index_path,
    open_tokens,
    read_ends,
    read_header,
    token_dtype,
)
from amlaunch.preprocess.stages.element import differences, prepare, skipped_in
from amlaunch.preprocess.stages.part_writer import make_part, remove_shard
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import fingerprint, read_json, read_object, sha256_file, write_json
from amlaunch.recipes.format.schema import Preprocess
from amlaunch.recipes.format.targets import Policy
from amlaunch.recipes.version import VERSION

CHUNK = 1 << 22
"""Tokens looked at in one go."""


class NotWhole(Failure):
    """A part is missing or a shard is damaged; the message says which element to run again."""


def verify(options: Preprocess, out: Path, progress: Progress, policy: Policy | None = None) -> dict[str, Any]:
    """Check the shards of all elements in ``out``, write ``manifest.json`` and return it.

    Raises NotWhole, naming them, for elements that are not finished and files
    that are damaged: these are renamed to ``*.damaged`` and their element
    counts as unfinished, so that running it again redoes just them. Raises
    BadInput where the parts are not of one origin, hold nothing to train on,
    or a shard lies there that none of them knows.
    """
    folder = OutputDir(out)
    count = check_one_origin(folder, options)
    parts = settle(folder, options, count, progress, policy)
    check_damage(folder, parts, progress)
    remove_rest(folder, parts, count)
    whole = manifest(parts)
    if not whole["splits"]["train"]:
        raise BadInput(f"{out}: {_nothing_to_train_on(whole)}")
    if whole["val_tokens"] < options.val_tokens:
        progress.say(
            f"{out}: only {whole['val_tokens']:,} of val_tokens {options.val_tokens:,}: the documents at the front ended before"
        )
    if options.format == "raw":
        whole["raw"] = write_raw(folder, whole)
    if _present(folder.manifest) != whole:
        write_json(folder.manifest, whole)
    for part in range(count):
        folder.lock(part).unlink(missing_ok=True)
    return whole


def _nothing_to_train_on(whole: dict[str, Any]) -> str:
    if whole["val_tokens"]:
        return f"preprocess.val_tokens: all {whole['val_tokens']:,} tokens went to validation: lower val_tokens, or give more text"
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in whole["skipped"].items())
    first = f"; the first: {whole['errors'][0]}" if whole["errors"] else ""
    return "no element found a document to train on: " + (
        f"all were left out ({skipped}{first})" if skipped else "the source is empty"
    )


def check_one_origin(folder: OutputDir, options: Preprocess) -> int:
    """How many parts the source has. Raises BadInput where elements were made from different things, or with other options."""
    origins = {path: read_object(path) for path in folder.origins()}
    if not origins:
        raise NotWhole(_unfinished(folder, options, range(options.elements)))
    first = next(iter(origins.values()))
    here = {name: getattr(options, name) for name in first.get("options", {})}
    expected = {**first, "options": here}
    for path, origin in origins.items():
        if differing := differences(origin, expected):
            raise BadInput(
                f"{folder.root}: element {int(path.stem.rpartition('-')[2])} was made from something else: "
                f"{'; '.join(differing)}. Remove the folder, or choose another preprocess.output_dir"
            )
    return int(first.get("parts", 0))


def settle(folder: OutputDir, options: Preprocess, count: int, progress: Progress, policy: Policy | None) -> list[Part]:
    """The parts that make up the output, in order, with exactly as many tokens as the budget has where the source has them.

    Raises NotWhole with the elements that are not finished, or the parts that are gone.
    """
    parts: list[Part] = []
    left = options.max_tokens
    context = engine = None
    for number in range(count):
        if left == 0:
            return parts
        part = read_part(folder, number)
        if part is None or not (part.fits(left) and part.whole(folder.root)):
            if part is None or left is None or not part.whole(folder.root):
                check_finished(folder, options, number)
            if context is None:
                context = prepare(options, folder.root, progress.say, policy)
                engine = context.engine()
                check_same(folder, context.origin)
            progress.say(
                f"part {number}: {'cut to' if part else 'made here, up to'} the {left:,} tokens that the budget has left"
            )
            assert engine is not None
            part = make_part(context, engine, number, left)
        parts.append(part)
        left = None if left is None else left - part.cursor.tokens
    if left:
        tokens = sum(part.cursor.tokens for part in parts)
        progress.say(f"{folder.root}: the source ended at {tokens:,} of {options.max_tokens:,} tokens of the budget")
    return parts


def check_same(folder: OutputDir, origin: dict[str, Any]) -> None:
    """Raise BadInput where the source or the tokenizer is another one by now."""
    there = read_object(next(folder.origins()))
    if differing := differences(there, origin):
        raise BadInput(f"{folder.root}: its shards were made from something else: {'; '.join(differing)}")


def check_finished(folder: OutputDir, options: Preprocess, part: int) -> None:
    """Raise NotWhole for a part that is not there, unless all elements are finished and left it out, the budget being full."""
    records = [read_object(folder.element(index)) for index in range(options.elements)]
    missing = [index for index, record in enumerate(records) if record.get("elements") != options.elements]
    if missing:
        raise NotWhole(_unfinished(folder, options, missing))
    owner = next((record["element"] for record in records if part in record.get("parts", [])), None)
    if owner is not None or options.max_tokens is None:
        forget(folder, part)
        raise NotWhole(
            f"{folder.root}: shards of part {part}{f' (element {owner})' if owner is not None else ''} are missing: "
            f"run the element again, it redoes just them"
        )


def _unfinished(folder: OutputDir, options: Preprocess, missing: Sequence[int]) -> str:
    names = ", ".join(map(str, missing[:20])) + (", …" if len(missing) > 20 else "")
    return (
        f"{folder.root}: {len(missing)} of {options.elements} elements are not finished: {names}. Run them first: "
        f"python -m amlaunch.preprocess element RECIPE --index {missing[0]} --out {folder.root}"
    )


def check_damage(folder: OutputDir, parts: Sequence[Part], progress: Progress) -> None:
    """Raise NotWhole with all shards that are not as their entries say; they are set aside."""
    damaged = []
    for part, entry in _counted(parts, progress):
        what = find_damage(folder.root, entry, part.origin["tokenizer"], part.origin["options"]["bos"])
        if what is not None:
            path, problem = what
            set_aside(folder, part.part, entry, path)
            damaged.append(f"{path.name}: {problem}")
    if damaged:
        raise NotWhole(
            f"{folder.root}: damaged: {'; '.join(damaged)}. What was there is kept as *.damaged; give the same command "
            f"again, it redoes just these shards"
        )


def _counted(parts: Sequence[Part], progress: Progress) -> Iterator[tuple[Part, ShardEntry]]:
    total, done = sum(part.cursor.tokens for part in parts), 0
    for part in parts:
        for entry in part.shards:
            progress.update(done, total)
            yield part, entry
            done += entry.tokens


def find_damage(root: Path, entry: Any, tokenizer: dict[str, Any], bos: bool) -> tuple[Path, str] | None:
    """The first file of a shard that is not as its entry (a ShardEntry, or a manifest's) says, and how; None where all is well.

    Digests first; then counts, document starts and token ids, in case the entry itself is wrong.
    """
    path = root / entry.file
    for file, digest in ((path, entry.sha256), (index_path(path), entry.idx_sha256)):
        if not file.exists():
            return file, "missing"
        if sha256_file(file) != digest:
            return file, "its sha256 is not what its writer noted"
    problem = wrong_content(path, entry, tokenizer, bos)
    return (path, problem) if problem else None


def wrong_content(path: Path, entry: Any, tokenizer: dict[str, Any], bos: bool) -> str | None:
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
    if bos and not np.all(tokens[starts] == tokenizer["bos"]):
        return "a document does not begin with the beginning-of-sequence token"
    top = max(int(tokens[at : at + CHUNK].max()) for at in range(0, len(tokens), CHUNK))
    return f"token id {top} is beyond the vocabulary" if top >= tokenizer["n_vocab"] else None


def set_aside(folder: OutputDir, part: int, entry: ShardEntry, path: Path) -> None:
    """Have the next run of the part's element redo this shard; the other shards stay valid."""
    (folder.root / entry.file).with_suffix(".json").unlink(missing_ok=True)
    forget(folder, part)
    if path.exists():
        path.replace(path.with_name(path.name + ".damaged"))


def forget(folder: OutputDir, part: int) -> None:
    """Have a part and its element count as unfinished, and no trainer read the folder."""
    folder.manifest.unlink(missing_ok=True)
    folder.part(part).unlink(missing_ok=True)
    for path in folder.root.glob("element-*.json"):
        if part in read_object(path).get("parts", [part]):
            path.unlink(missing_ok=True)


def remove_rest(folder: OutputDir, parts: Sequence[Part], count: int) -> None:
    """Take away what elements made beyond the budget, or began to when they were killed. Raises BadInput for shards that no part knows, with their names."""
    known = {entry.file for part in parts for entry in part.shards}
    origin = fingerprint(parts[0].origin) if parts else ""
    foreign = []
    for name in sorted(folder.shards_on_disk() - known):
        path, number = folder.root / name, int(name.split("-")[1])
        entry = read_entry(path)
        if len(parts) <= number < count and (entry is None or entry.origin == origin):
            folder.part(number).unlink(missing_ok=True)
            remove_shard(path)
        else:
            foreign.append(name)
    for number in range(len(parts), count):  # those without a shard
        folder.part(number).unlink(missing_ok=True)
    for leftover in folder.leftovers():
        leftover.unlink(missing_ok=True)
    if foreign:
        names = ", ".join(foreign[:20]) + (", …" if len(foreign) > 20 else "")
        raise BadInput(
            f"{folder.root}: no element here made these shards: {names}. Remove them, or choose another preprocess.output_dir"
        )


def manifest(parts: Sequence[Part]) -> dict[str, Any]:
    """What the trainer needs to know of the finished parts; see :func:`preprocess.shards.read_manifest`."""
    entries = [entry for part in parts for entry in part.shards]
    origin = parts[0].origin
    tokens, text = sum(entry.tokens for entry in entries), sum(entry.text_bytes for entry in entries)
    return {
        "version": MANIFEST_VERSION,
        "created_by": f"amlaunch {VERSION}",
        "tokenizer": origin["tokenizer"],
        "item_size": token_dtype(origin["tokenizer"]["n_vocab"]).itemsize,
        "tokens": tokens,
        "train_tokens": sum(part.cursor.train for part in parts),
        "val_tokens": sum(part.cursor.val for part in parts),
        "documents": sum(entry.documents for entry in entries),
        "skipped": skipped_in(parts),
        "repaired": sum(entry.repaired for entry in entries),
        "text_bytes": text,
        "bytes_per_token": round(text / tokens, 3) if tokens else None,
        "histogram": [sum(column) for column in zip_longest(*(entry.histogram for entry in entries), fillvalue=0)],
        "errors": list(errors_in(parts))[:ERRORS_LISTED],
        "source": origin["source"],
        "options": {**origin["options"], "parts": origin["parts"]},
        "fingerprint": fingerprint([entry.sha256 for entry in entries]),
        "splits": {split: [_listed(entry) for entry in entries if entry.split == split] for split in ("train", "val")},
    }


def errors_in(parts: Sequence[Part]) -> Iterator[str]:
    """What the damaged records were that are left out, as far as they are listed."""
    for part in parts:
        for entry in part.shards:
            yield from entry.errors
        yield from part.errors


def _listed(entry: ShardEntry) -> dict[str, Any]:
    names = ("file", "tokens", "documents", "bytes", "sha256", "idx_sha256", "source")
    return {name: getattr(entry, name) for name in names}


def _present(path: Path) -> Any:
    try:
        return read_json(path)
    except ValueError:
        return None


def result(whole: dict[str, Any], out: Path) -> dict[str, Any]:
    """What the stage says of itself in ``result.json``: it vouches for every shard."""
    root = out.absolute()
    paths = [root / entry["file"] for entries in whole["splits"].values() for entry in entries]
    names = ("tokens", "train_tokens", "val_tokens", "documents", "skipped")
    files = [OutputDir(root).manifest, *paths, *map(index_path, paths), *(root / name for name in whole.get("raw", {}))]
    return {name: whole[name] for name in names} | {
        "shards": len(paths),
        "outputs": {str(path): path.stat().st_size for path in files},
    }
