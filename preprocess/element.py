"""One array element: its part of the source, as shards.

Where a shard ends is a function of the document stream alone, and a shard's
``.json`` is written last. So a restart, after any kill, takes every whole shard
as it is, enters the stream behind it, and writes what an undisturbed run would
have written, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from preprocess.parts import START, Cursor, OutputDir, Part, ShardEntry, read_entry, read_part
from preprocess.progress import Progress
from preprocess.shards import MAX_TOKENS, Tokens, index_path, write_shard
from preprocess.sources import Skipped, Source, open_source
from preprocess.tokenizer import Tokenizer, load_tokenizer
from recipes.errors import BadInput
from recipes.files import Lock, fingerprint, read_json, sha256_file, write_json
from recipes.schema import Preprocess


def share(total: int, index: int, elements: int) -> int:
    """Element ``index``'s share of ``total``; the shares differ by at most one and add up to it."""
    return total // elements + (index < total % elements)


@dataclass(frozen=True)
class Limits:
    """What one element may write, in tokens."""

    total: int | None
    """Both splits; exact unless the source ends before."""
    val: int
    """The first whole documents, until there are so many, are validation."""
    shard: int

    def split(self, cursor: Cursor) -> str:
        """To which split the next document goes."""
        return "val" if cursor.val < self.val else "train"

    def left(self, cursor: Cursor) -> int | None:
        """Tokens until the budget is used up; None without one."""
        return None if self.total is None else self.total - cursor.tokens


def element_limits(options: Preprocess, index: int) -> Limits:
    """The limits of element ``index``. Raises BadInput where they leave nothing to train on, or no shard can be so large."""
    total, val = options.max_tokens, options.val_tokens
    if not 0 < options.shard_tokens <= MAX_TOKENS:
        raise BadInput(
            f"preprocess.shard_tokens: {options.shard_tokens:,}: a shard holds 1 to {MAX_TOKENS:,} tokens (its count is an int32)"
        )
    if total is not None and total < options.elements:
        raise BadInput(f"preprocess.max_tokens: {total:,} tokens cannot be shared between {options.elements} elements")
    if total is not None and val >= total:
        raise BadInput(f"preprocess.val_tokens: {val:,} of max_tokens {total:,} leave nothing to train on")
    own = None if total is None else share(total, index, options.elements)
    return Limits(own, share(val, index, options.elements), options.shard_tokens)


class Document(NamedTuple):
    """A document's tokens, BOS first, and the stream's count of records and of what it skipped, this one included."""

    tokens: Tokens
    records: int
    skipped: Mapping[str, int]


class Documents:
    """An element's documents as tokens, with one document of lookahead."""

    def __init__(self, source: Source, tokenizer: Tokenizer):
        self._source = source
        self._tokenizer = tokenizer
        self._stream: Iterator[Document] | None = None
        self._ahead: Document | None = None
        self._position = 0
        self.records = 0
        """Taken from the source so far."""
        self.skipped: Mapping[str, int] = {}

    def enter(self, cursor: Cursor) -> None:
        """Go on behind ``cursor``; free where the stream stands there already."""
        if self._stream is not None and self._position == cursor.records:
            return
        self._position = self.records = cursor.records
        self.skipped = cursor.skipped
        self._stream = self._read(self._source.records(cursor.records))
        self._ahead = None

    def peek(self) -> Document | None:
        """The next document, read when it is first asked for; None at the end of the source."""
        if self._ahead is None and self._stream is not None:
            self._ahead = next(self._stream, None)
        return self._ahead

    def advance(self) -> None:
        """Take the document that :meth:`peek` shows."""
        if self._ahead is None:
            raise ValueError("there is no document to take")
        self._position = self._ahead.records
        self._ahead = None

    def _read(self, records: Iterator[str | Skipped]) -> Iterator[Document]:
        for record in records:
            self.records += 1
            reason = record.reason if isinstance(record, Skipped) else ("" if record else "empty")
            if reason:
                self.skipped = {**self.skipped, reason: self.skipped.get(reason, 0) + 1}
            elif isinstance(record, str):
                yield Document(self._tokenizer.encode_document(record), self.records, self.skipped)


def next_shard(documents: Documents, cursor: Cursor, limits: Limits) -> Iterator[tuple[Tokens, Cursor]]:
    """The documents of the shard that begins at ``cursor``, each with the cursor behind it.

    The shard ends before the document that would make it too large (one that is
    too large alone has a shard to itself), where its split is complete, or
    with the budget, which cuts the last document.
    """
    split = limits.split(cursor)
    size = 0
    while size < limits.shard and (document := documents.peek()) is not None:
        tokens = document.tokens[: limits.left(cursor)]
        if size and size + len(tokens) > limits.shard:
            return
        documents.advance()
        size += len(tokens)
        cursor = cursor.after(split, len(tokens), document.records, document.skipped)
        yield tokens, cursor
        if limits.left(cursor) == 0 or limits.split(cursor) != split:
            return


@dataclass(frozen=True)
class Job:
    """Everything that one element works with."""

    index: int
    out: OutputDir
    limits: Limits
    documents: Documents
    tokenizer: Tokenizer
    origin: dict[str, Any]
    progress: Progress

    def walk(self, obtain: Callable[[Path, str, Cursor], ShardEntry | None]) -> Iterator[ShardEntry]:
        """The element's shards in order, as ``obtain`` gives each from its path, split and first cursor, until it gives none."""
        cursor, numbers = START, {"train": 0, "val": 0}
        while self.limits.left(cursor) != 0:
            split = self.limits.split(cursor)
            entry = obtain(self.out.shard(split, self.index, numbers[split]), split, cursor)
            if entry is None:
                return
            yield entry
            numbers[split] += 1
            cursor = entry.cursor

    def whole(self, path: Path, _split: str, cursor: Cursor) -> ShardEntry | None:
        """The shard at ``path`` if it is there in full and begins at ``cursor``."""
        entry = read_entry(path)
        if entry is None or entry.start != cursor.records or entry.origin != fingerprint(self.origin):
            return None
        return entry if entry.sizes_agree(self.out.root) else None

    def write(self, path: Path, split: str, cursor: Cursor) -> ShardEntry | None:
        """Write the shard that begins at ``cursor``, its ``.json`` last; None where the source has no more documents."""
        self.documents.enter(cursor)
        if self.documents.peek() is None:
            return None
        path.with_suffix(".json").unlink(missing_ok=True)  # it may speak of files that are about to change
        after = cursor

        def counted() -> Iterator[Tokens]:
            nonlocal after
            for tokens, after in next_shard(self.documents, cursor, self.limits):
                documents = after.records - sum(after.skipped.values())
                self.progress.update(after.tokens, self.limits.total, documents=documents)
                yield tokens

        header = write_shard(path, counted(), self.tokenizer.dtype)
        entry = ShardEntry(
            file=path.name,
            split=split,
            tokens=header.tokens,
            documents=header.documents or 0,
            bytes=path.stat().st_size,
            sha256=sha256_file(path),
            idx_sha256=sha256_file(index_path(path)),
            start=cursor.records,
            cursor=after,
            origin=fingerprint(self.origin),
        )
        write_json(path.with_suffix(".json"), entry.to_json())
        self.progress.say(f"{path.name}: {entry.tokens:,} tokens, {entry.documents:,} documents")
        return entry


def run_element(options: Preprocess, index: int, out: Path, progress: Progress) -> Part:
    """Make element ``index`` of ``options`` in the folder ``out``, or what is missing of it.

    Raises BadInput (the recipe, the source, or a folder made from something
    else), Failure, and StopRequested; the same call then goes on.
    """
    limits = element_limits(options, index)
    source = open_source(options, index)
    tokenizer = load_tokenizer(options.tokenizer)
    origin = describe(options, source, tokenizer)
    folder = OutputDir(out)
    lock = _take_lock(folder, index, progress)
    try:
        check_origin(folder, index, origin)
        if (part := whole_part(folder, index)) is not None:
            progress.begin(part.cursor.tokens)
            progress.finish(part.cursor.tokens, limits.total, f"element {index}: already there: {summary(part)}")
            return part
        for leftover in folder.leftovers(index):
            leftover.unlink(missing_ok=True)
        job = Job(index, folder, limits, Documents(source, tokenizer), tokenizer, origin, progress)
        return finish(job)
    finally:
        lock.release()


def finish(job: Job) -> Part:
    """Make all shards of the element, then its part file."""
    already = list(job.walk(job.whole))
    if already:
        last = already[-1].cursor
        job.progress.begin(last.tokens)
        job.progress.say(f"element {job.index}: goes on after {len(already)} whole shards ({last.tokens:,} tokens)")
    entries = tuple(job.walk(lambda *where: job.whole(*where) or job.write(*where)))
    cursor = entries[-1].cursor if entries else START
    if job.limits.left(cursor) != 0:  # the source ended: what it skipped behind the last document counts too
        cursor = cursor._replace(records=job.documents.records, skipped=job.documents.skipped)
        if job.limits.total is not None:
            job.progress.say(
                f"element {job.index}: the source ended at {cursor.tokens:,} of {job.limits.total:,} tokens of the budget"
            )
    part = Part(job.index, job.origin, entries, cursor)
    write_json(job.out.part(job.index), part.to_json())
    job.progress.finish(
        cursor.tokens, job.limits.total, f"element {job.index}: {summary(part)}", documents=part.documents
    )
    return part


def _take_lock(folder: OutputDir, index: int, progress: Progress) -> Lock:
    lock = Lock(folder.lock(index))
    if not lock.acquire():
        progress.say(f"element {index}: another process works on it in {folder.root}; waiting until it is done")
        lock.acquire(wait=True)
    return lock


def describe(options: Preprocess, source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """What the shards' bytes are a function of."""
    names = ("max_tokens", "val_tokens", "shard_tokens", "elements")
    limits = {name: getattr(options, name) for name in names}
    return {"source": source.identity(), "tokenizer": tokenizer.identity(), "options": limits}


def check_origin(folder: OutputDir, index: int, origin: dict[str, Any]) -> None:
    """Write down what this element is made from. Raises BadInput where the folder was made from something else."""
    for path in folder.origins():
        try:
            there = read_json(path)
        except ValueError as error:
            raise BadInput(f"{error}; remove {folder.root} or choose another output_dir") from None
        if there is not None and (differing := differences(there, origin)):
            raise BadInput(
                f"{folder.root}: its shards were made from something else: {'; '.join(differing)}. "
                f"Remove the folder, or choose another preprocess.output_dir"
            )
    if not folder.origin(index).exists():
        write_json(folder.origin(index), origin)


def differences(there: Mapping[str, Any], here: Mapping[str, Any], path: str = "") -> list[str]:
    """What differs between two descriptions, as ``key: this, now that``."""
    found = []
    for key in dict.fromkeys([*there, *here]):
        old, new = there.get(key), here.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{path}{key}.")
        elif old != new:
            found.append(f"{path}{key} was {old!r}, is {new!r}")
    return found


def whole_part(folder: OutputDir, index: int) -> Part | None:
    """The finished element, if all its files are there in full length."""
    part = read_part(folder, index)
    return part if part and all(entry.sizes_agree(folder.root) for entry in part.shards) else None


def summary(part: Part) -> str:
    """A finished element in a line."""
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in sorted(part.cursor.skipped.items()))
    return (
        f"{part.cursor.train:,} train and {part.cursor.val:,} val tokens, {part.documents:,} documents, "
        f"{len(part.shards)} shards" + (f" (skipped: {skipped})" if skipped else "")
    )


def result(part: Part, out: Path) -> dict[str, Any]:
    """What the element says of itself in ``result.json``."""
    root = out.absolute()
    paths = [root / entry.file for entry in part.shards]
    paths += [index_path(path) for path in paths] + [OutputDir(root).part(part.element)]
    return {
        "tokens": part.cursor.tokens,
        "documents": part.documents,
        "shards": len(part.shards),
        "skipped": dict(part.cursor.skipped),
        "train_tokens": part.cursor.train,
        "val_tokens": part.cursor.val,
        "outputs": {str(path): path.stat().st_size for path in paths},
    }
