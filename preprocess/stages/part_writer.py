"""One part of the source, as shards.

Where a shard ends is a function of the part's documents alone, and a shard's
``.json`` is written last. So a restart, after any kill, takes every whole shard
as it is, enters the stream behind it, and writes what an undisturbed run would
have written, byte for byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from amlaunch.preprocess.shards.output_folder import (
    ERRORS_LISTED,
    START,
    Cursor,
    OutputDir,
    Part,
    ShardEntry,
    read_entry,
    read_part,
)
from amlaunch.preprocess.shards.shard_format import Tokens, index_path, read_ends, write_shard
from amlaunch.preprocess.sources.records import Bad, Record, Skipped
from amlaunch.preprocess.sources.source import Source
from amlaunch.preprocess.tokenizers.engine import Differs, Engine
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import Lock, fingerprint, sha256_file, write_json

REPORT_SECONDS = 0.1
"""Between two words of how far a part is: a document takes a fraction of a millisecond."""


@dataclass(frozen=True)
class Limits:
    """What one part may write, in tokens."""

    total: int | None
    """Both splits; exact unless the part ends before."""
    val: int
    """The first whole documents, until there are so many, are validation."""
    shard: int

    def split(self, cursor: Cursor) -> str:
        """To which split the next document goes."""
        return "val" if cursor.val < self.val else "train"

    def left(self, cursor: Cursor) -> int | None:
        """Tokens until the budget is used up; None without one."""
        return None if self.total is None else self.total - cursor.tokens


class Document(NamedTuple):
    """A document's tokens, and the stream's count of records and of what it skipped, this one included."""

    tokens: Tokens
    records: int
    skipped: Mapping[str, int]
    text_bytes: int
    repaired: bool
    errors: tuple[str, ...]
    """Of the damaged records since the document before."""


class Documents:
    """A part's documents as tokens, with one document of lookahead."""

    def __init__(self, open_records: Callable[[int], Iterator[Record]], engine: Engine, skip_bad: bool = False):
        self._open = open_records
        self.engine = engine
        self._skip_bad = skip_bad
        self._stream: Iterator[Document] | None = None
        self._ahead: Document | None = None
        self._position = 0
        self.records = 0
        """Taken from the source so far."""
        self.skipped: Mapping[str, int] = {}
        self.errors: list[str] = []
        """Damaged records since the last document."""

    def enter(self, cursor: Cursor, afresh: bool = False) -> None:
        """Go on behind ``cursor``; free where the stream stands there already (unless it is to be read ``afresh``)."""
        if self._stream is not None and self._position == cursor.records and not afresh:
            return
        self._position = self.records = cursor.records
        self.skipped = cursor.skipped
        self.errors = []
        self._stream = self._read(self._open(cursor.records))
        self._ahead = None

    def peek(self) -> Document | None:
        """The next document, read when it is first asked for; None at the end of the part."""
        if self._ahead is None and self._stream is not None:
            self._ahead = next(self._stream, None)
        return self._ahead

    def advance(self) -> None:
        """Take the document that :meth:`peek` shows."""
        if self._ahead is None:
            raise ValueError("there is no document to take")
        self._position = self._ahead.records
        self._ahead = None

    def _read(self, records: Iterator[Record]) -> Iterator[Document]:
        for record in records:
            self.records += 1
            if isinstance(record, str) and record:
                size, repaired = measure(record)
                errors, self.errors = tuple(self.errors), []
                tokens = self.engine.encode_document(record)
                yield Document(tokens, self.records, self.skipped, size, repaired, errors)
            else:
                self._count(record)

    def _count(self, record: Record) -> None:
        reason = record.reason if isinstance(record, (Skipped, Bad)) else "empty"
        if isinstance(record, Bad):
            if not self._skip_bad:
                raise BadInput(
                    f"{record.message} (preprocess.on_error: skip leaves such out, and counts and lists them)"
                )
            if len(self.errors) < ERRORS_LISTED:
                self.errors.append(record.message)
        self.skipped = {**self.skipped, reason: self.skipped.get(reason, 0) + 1}


def measure(text: str) -> tuple[int, bool]:
    """Bytes of a text in UTF-8, and whether lone surrogates in it have to be repaired."""
    if text.isascii():
        return len(text), False
    try:
        return len(text.encode()), False
    except UnicodeEncodeError:
        return len(text.encode("utf-8", "surrogatepass")), True


def next_shard(documents: Documents, cursor: Cursor, limits: Limits) -> Iterator[Document]:
    """The documents of the shard that begins at ``cursor``.

    The shard ends before the document that would make it too large (one that is
    too large alone has a shard to itself), where its split is complete, or
    with the budget, which cuts the last document. That does not move the ends
    before it: a shorter budget gives the beginning of what a longer one gives.
    """
    left = limits.left(cursor)
    wanted = min(limits.shard, limits.val - cursor.val) if limits.split(cursor) == "val" else limits.shard
    size = 0
    while size < wanted and size != left and (document := documents.peek()) is not None:
        behind = size + len(document.tokens)
        if size and behind > limits.shard:
            return
        documents.advance()
        if left is not None and behind > left:
            document, behind = document._replace(tokens=document.tokens[: left - size]), left
        size = behind
        yield document


class Written:
    """What is counted while the shard that begins at ``start`` is written."""

    def __init__(self, start: Cursor, split: str):
        self.start = start
        self.split = split
        self.last: Document | None = None
        self.tokens = 0
        self.text_bytes = 0
        self.repaired = 0
        self.errors: list[str] = []

    def add(self, document: Document) -> None:
        """One more document."""
        self.last = document
        self.tokens += len(document.tokens)
        self.text_bytes += document.text_bytes
        self.repaired += document.repaired
        self.errors += document.errors

    @property
    def cursor(self) -> Cursor:
        """Behind the last document."""
        if self.last is None:
            return self.start
        return self.start.after(self.split, self.tokens, self.last.records, self.last.skipped)


@dataclass(frozen=True)
class Beat:
    """How far a part is."""

    part: int
    tokens: int
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class Context:
    """Everything that all parts of a folder have in common."""

    out: OutputDir
    source: Source
    tokenizer: Any
    engine: Callable[[], Engine]
    """Opens one for this process."""
    origin: dict[str, Any]
    val: list[int]
    """Of each part."""
    shard: int
    skip_bad: bool
    report: Callable[[Beat], None] = lambda beat: None
    say: Callable[[str], None] = print


class Job:
    """Makes one part."""

    def __init__(self, context: Context, engine: Engine, part: int, total: int | None):
        self.context = context
        self.part = part
        self.out = context.out
        self.limits = Limits(total, context.val[part], context.shard)
        self.documents = Documents(lambda skip: context.source.records(part, skip), engine, context.skip_bad)
        self.origin = fingerprint(context.origin)
        self._text_bytes = 0
        self._reported = 0.0

    def walk(self, obtain: Callable[[Path, str, Cursor], ShardEntry | None]) -> Iterator[ShardEntry]:
        """The part's shards in order, as ``obtain`` gives each from its path, split and first cursor, until it gives none."""
        cursor, numbers = START, {"train": 0, "val": 0}
        while self.limits.left(cursor) != 0:
            split = self.limits.split(cursor)
            entry = obtain(self.out.shard(split, self.part, numbers[split]), split, cursor)
            if entry is None:
                return
            yield entry
            numbers[split] += 1
            cursor = entry.cursor

    def whole(self, path: Path, _split: str, cursor: Cursor) -> ShardEntry | None:
        """The shard at ``path`` if it is there in full, begins at ``cursor`` and ends where it should."""
        entry = read_entry(path)
        if entry is None or entry.start != cursor.records or entry.origin != self.origin:
            return None
        left = self.limits.left(entry.cursor)
        if (left is not None and left < 0) or entry.cut != (left == 0):
            return None
        return entry if entry.sizes_agree(self.out.root) else None

    def write(self, path: Path, split: str, cursor: Cursor) -> ShardEntry | None:
        """Write the shard that begins at ``cursor``; again, with the reference, where the fast engine is found out."""
        try:
            return self._write(path, split, cursor)
        except Differs:
            self.context.say(
                f"{path.name}: gigatoken and tiktoken gave different tokens for a document: the shard is made again by "
                f"tiktoken, and so is all that follows"
            )
            self.documents.enter(cursor, afresh=True)
            return self._write(path, split, cursor)

    def _write(self, path: Path, split: str, cursor: Cursor) -> ShardEntry | None:
        """Write a shard, its ``.json`` last; None where the part has no more documents."""
        self.documents.enter(cursor)
        self.documents.engine.begin_shard()
        if self.documents.peek() is None:
            return None
        path.with_suffix(".json").unlink(missing_ok=True)  # it may speak of files that are about to change
        written = Written(cursor, split)

        def counted() -> Iterator[Tokens]:
            for document in next_shard(self.documents, cursor, self.limits):
                written.add(document)
                self._report(written)
                yield document.tokens

        header = write_shard(path, counted(), self.context.tokenizer.dtype)
        after = written.cursor
        entry = ShardEntry(
            file=path.name,
            split=split,
            tokens=header.tokens,
            documents=header.documents or 0,
            bytes=path.stat().st_size,
            sha256=sha256_file(path),
            idx_sha256=sha256_file(index_path(path)),
            source=f"part {self.part}, records {cursor.records} to {after.records}",
            start=cursor.records,
            cursor=after,
            cut=self.limits.left(after) == 0,
            origin=self.origin,
            text_bytes=written.text_bytes,
            repaired=written.repaired,
            histogram=histogram(path),
            errors=tuple(written.errors[:ERRORS_LISTED]),
        )
        write_json(path.with_suffix(".json"), entry.to_json())
        self._text_bytes += entry.text_bytes
        return entry

    def _report(self, written: Written) -> None:
        now = time.monotonic()
        if now - self._reported < REPORT_SECONDS:
            return
        self._reported = now
        after = written.cursor
        documents = after.records - sum(after.skipped.values())
        self.context.report(Beat(self.part, after.tokens, documents, self._text_bytes + written.text_bytes))

    def finish(self) -> Part:
        """Make all shards of the part, then its own file; what a longer budget left behind them goes."""
        entries = []
        for entry in self.walk(lambda *where: self.whole(*where) or self.write(*where)):
            entries.append(entry)
        cursor = entries[-1].cursor if entries else START
        complete = self.limits.left(cursor) != 0
        errors: tuple[str, ...] = ()
        if complete:  # what was skipped behind the last document counts too
            cursor = cursor._replace(records=self.documents.records, skipped=self.documents.skipped)
            errors = tuple(self.documents.errors)
        remove_shards(self.out, self.part, {entry.file for entry in entries})
        part = Part(self.part, self.context.origin, tuple(entries), cursor, complete, errors)
        write_json(self.out.part(self.part), part.to_json(), durable=False)  # made of the shards' entries, which are
        return part


def remove_shards(out: OutputDir, part: int, keep: set[str]) -> None:
    """Take away the shards of a part that are not in ``keep``, their entries first."""
    for name in sorted(out.shards_on_disk() - keep):
        if int(name.split("-")[1]) == part:
            remove_shard(out.root / name)


def remove_shard(path: Path) -> None:
    """Take away a shard, what vouches for it first."""
    for file in (path.with_suffix(".json"), index_path(path), path):
        file.unlink(missing_ok=True)


def histogram(path: Path) -> tuple[int, ...]:
    """How many documents of a shard have 1, 2 to 3, 4 to 7, … tokens."""
    lengths = np.diff(read_ends(path).astype(np.int64), prepend=0)
    return tuple(np.bincount(np.frexp(lengths)[1] - 1).tolist())


def make_part(context: Context, engine: Engine, part: int, total: int | None) -> Part:
    """The part, made where it is missing; one process at a time works on it.

    ``total``: the most tokens that are of use. Raises BadInput (a damaged record, a folder that
    was made from something else), Failure, OSError and StopRequested; the same call then goes on.
    """
    lock = Lock(context.out.lock(part))
    if not lock.acquire():
        context.say(f"part {part}: another process works on it in {context.out.root}; waiting until it is done")
        lock.acquire(wait=True)
    try:
        if (found := whole_part(context, part)) is not None and found.fits(total):
            return found
        for leftover in context.out.leftovers(part):
            leftover.unlink(missing_ok=True)
        context.out.part(part).unlink(missing_ok=True)
        return Job(context, engine, part, total).finish()
    finally:
        lock.release()


def whole_part(context: Context, part: int) -> Part | None:
    """A part that is finished and was made from the same, if all its files are there in full length."""
    found = read_part(context.out, part)
    return found if found and found.origin == context.origin and found.whole(context.out.root) else None
