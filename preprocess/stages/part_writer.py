"""Writing one part of the source as shards.

The end of a shard depends only on the part's documents, and a shard's ``.json`` is written last. So a restart after any
kill keeps every finished shard, enters the stream after it, and writes what an uninterrupted run would have written,
byte for byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from amlaunch.preprocess.shards.output_folder import (
    MAX_LISTED_ERRORS,
    START_CURSOR,
    Cursor,
    FinishedPart,
    OutputDir,
    ShardEntry,
    part_number,
    read_entry,
    read_part,
)
from amlaunch.preprocess.shards.shard_format import Tokens, index_path, read_ends, write_shard
from amlaunch.preprocess.sources.records import DamagedRecord, Record, SkippedRecord
from amlaunch.preprocess.sources.source import Source
from amlaunch.preprocess.tokenizers.engine import Engine, TokenMismatch
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import Lock, fingerprint, sha256_file, write_json

REPORT_SECONDS = 0.1
"""Between two progress reports of a part: a document takes a fraction of a millisecond."""


@dataclass(frozen=True)
class PartLimits:
    """Limits of one part, in tokens."""

    max_tokens: int | None
    """Tokens of both splits; the part has exactly this many unless it ends before. None: no limit."""
    val_tokens: int
    """The first documents go to validation until it has at least this many tokens."""
    shard_tokens: int

    def split_at(self, cursor: Cursor) -> str:
        """Return the split of the next document."""
        return "val" if cursor.val < self.val_tokens else "train"

    def tokens_left(self, cursor: Cursor) -> int | None:
        """Return the tokens that remain of the budget; None without one."""
        return None if self.max_tokens is None else self.max_tokens - cursor.tokens


class TokenizedDocument(NamedTuple):
    """A document's tokens, with the stream's counts up to and including it."""

    tokens: Tokens
    records: int
    skipped: Mapping[str, int]
    text_bytes: int
    repaired: bool
    errors: tuple[str, ...]
    """Damaged records since the previous document."""


class DocumentStream:
    """A part's documents as tokens, with one document of lookahead."""

    def __init__(self, open_records: Callable[[int], Iterator[Record]], engine: Engine, skip_damaged: bool = False):
        self.engine = engine
        self.records = 0
        """Records taken from the source so far."""
        self.skipped: Mapping[str, int] = {}
        """Records without a document so far, by reason."""
        self.errors: list[str] = []
        """Damaged records since the last document."""
        self._open_records = open_records
        self._skip_damaged = skip_damaged
        self._documents: Iterator[TokenizedDocument] | None = None
        self._next_document: TokenizedDocument | None = None
        self._position = 0

    def seek(self, cursor: Cursor, reopen: bool = False) -> None:
        """Continue after ``cursor``; costs nothing if the stream is there already, unless ``reopen``."""
        if self._documents is not None and self._position == cursor.records and not reopen:
            return
        self._position = self.records = cursor.records
        self.skipped = cursor.skipped
        self.errors = []
        self._documents = self._tokenize(self._open_records(cursor.records))
        self._next_document = None

    def peek(self) -> TokenizedDocument | None:
        """Return the next document without taking it; None at the end of the part."""
        if self._next_document is None and self._documents is not None:
            self._next_document = next(self._documents, None)
        return self._next_document

    def advance(self) -> None:
        """Take the document that :meth:`peek` returned."""
        if self._next_document is None:
            raise ValueError("advance() needs a document from peek()")
        self._position = self._next_document.records
        self._next_document = None

    def _tokenize(self, records: Iterator[Record]) -> Iterator[TokenizedDocument]:
        for record in records:
            self.records += 1
            if isinstance(record, str) and record:
                text_bytes, repaired = measure_text(record)
                errors, self.errors = tuple(self.errors), []
                tokens = self.engine.encode_document(record)
                yield TokenizedDocument(tokens, self.records, self.skipped, text_bytes, repaired, errors)
            else:
                self._skip(record)

    def _skip(self, record: Record) -> None:
        reason = record.reason if isinstance(record, (SkippedRecord, DamagedRecord)) else "empty"
        if isinstance(record, DamagedRecord):
            if not self._skip_damaged:
                raise BadInput(
                    f"{record.message} (to skip, count and list damaged records, set preprocess.on_error: skip)"
                )
            if len(self.errors) < MAX_LISTED_ERRORS:
                self.errors.append(record.message)
        self.skipped = {**self.skipped, reason: self.skipped.get(reason, 0) + 1}


def measure_text(text: str) -> tuple[int, bool]:
    """Return a text's size in UTF-8, and True if it has lone surrogates, which must be repaired."""
    if text.isascii():
        return len(text), False
    try:
        return len(text.encode()), False
    except UnicodeEncodeError:
        return len(text.encode("utf-8", "surrogatepass")), True


def shard_documents(stream: DocumentStream, cursor: Cursor, limits: PartLimits) -> Iterator[TokenizedDocument]:
    """Yield the documents of the shard that begins at ``cursor``.

    The shard ends before the document that would make it too large (a document that is too large by itself gets its own
    shard), where its split is complete, or with the budget, which cuts the last document. That does not move earlier
    ends: a smaller budget gives the beginning of what a larger one gives.
    """
    tokens_left = limits.tokens_left(cursor)
    target = limits.shard_tokens
    if limits.split_at(cursor) == "val":
        target = min(target, limits.val_tokens - cursor.val)

    size = 0
    while size < target and size != tokens_left and (document := stream.peek()) is not None:
        size_after = size + len(document.tokens)
        if size and size_after > limits.shard_tokens:
            return
        stream.advance()
        if tokens_left is not None and size_after > tokens_left:
            document = document._replace(tokens=document.tokens[: tokens_left - size])
            size_after = tokens_left
        size = size_after
        yield document


class ShardCounts:
    """Running counts of the shard that begins at ``start``, while it is written."""

    def __init__(self, start: Cursor, split: str):
        self.start = start
        self.split = split
        self.tokens = 0
        self.text_bytes = 0
        self.repaired = 0
        self.errors: list[str] = []
        self._last_document: TokenizedDocument | None = None

    def add(self, document: TokenizedDocument) -> None:
        """Count one more document."""
        self._last_document = document
        self.tokens += len(document.tokens)
        self.text_bytes += document.text_bytes
        self.repaired += document.repaired
        self.errors += document.errors

    @property
    def cursor(self) -> Cursor:
        """The position after the last document."""
        if self._last_document is None:
            return self.start
        return self.start.after(self.split, self.tokens, self._last_document.records, self._last_document.skipped)


@dataclass(frozen=True)
class PartProgress:
    """Progress of a part."""

    part: int
    tokens: int
    documents: int
    text_bytes: int


@dataclass(frozen=True)
class PreprocessContext:
    """Everything that all parts of a folder share."""

    out: OutputDir
    source: Source
    tokenizer: Any
    open_engine: Callable[[], Engine]
    """Creates an engine for this process."""
    origin: dict[str, Any]
    val_tokens: list[int]
    """Validation tokens of each part."""
    shard_tokens: int
    skip_damaged: bool
    report: Callable[[PartProgress], None] = lambda progress: None
    log: Callable[[str], None] = print


class PartWriter:
    """Writes one part."""

    def __init__(self, context: PreprocessContext, engine: Engine, number: int, max_tokens: int | None):
        self.context = context
        self.number = number
        self.out = context.out
        self.limits = PartLimits(max_tokens, context.val_tokens[number], context.shard_tokens)
        self.stream = DocumentStream(lambda skip: context.source.records(number, skip), engine, context.skip_damaged)
        self.origin = fingerprint(context.origin)
        self._text_bytes = 0
        self._last_report = 0.0

    def write(self) -> FinishedPart:
        """Write all missing shards of the part, then its record; remove shards that a larger budget left behind."""
        entries = list(self.shards())
        cursor = entries[-1].cursor if entries else START_CURSOR
        complete = self.limits.tokens_left(cursor) != 0
        errors: tuple[str, ...] = ()
        if complete:
            # Records skipped after the last document count too.
            cursor = cursor._replace(records=self.stream.records, skipped=self.stream.skipped)
            errors = tuple(self.stream.errors)
        remove_shards(self.out, self.number, {entry.file for entry in entries})

        part = FinishedPart(self.number, self.context.origin, tuple(entries), cursor, complete, errors)
        # Need not be durable: it can be rebuilt from the shards' entries, which are.
        write_json(self.out.part(self.number), part.to_json(), durable=False)
        return part

    def shards(self) -> Iterator[ShardEntry]:
        """Yield the part's shards in order, each from disk if it is finished, else newly written."""
        cursor, numbers = START_CURSOR, {"train": 0, "val": 0}
        while self.limits.tokens_left(cursor) != 0:
            split = self.limits.split_at(cursor)
            path = self.out.shard(split, self.number, numbers[split])
            entry = self.finished_shard(path, cursor) or self.write_shard(path, split, cursor)
            if entry is None:
                return
            yield entry
            numbers[split] += 1
            cursor = entry.cursor

    def finished_shard(self, path: Path, cursor: Cursor) -> ShardEntry | None:
        """Return the entry of the shard at ``path``; None if it is incomplete, or its begin or end is wrong."""
        entry = read_entry(path)
        if entry is None or entry.start != cursor.records or entry.origin != self.origin:
            return None
        tokens_left = self.limits.tokens_left(entry.cursor)
        exceeds_budget = tokens_left is not None and tokens_left < 0
        if exceeds_budget or entry.cut != (tokens_left == 0):
            return None
        return entry if entry.has_complete_files(self.out.root) else None

    def write_shard(self, path: Path, split: str, cursor: Cursor) -> ShardEntry | None:
        """Write the shard that begins at ``cursor``; start over with tiktoken if gigatoken proves to be wrong.

        Returns None if the part has no more documents.
        """
        try:
            return self._write_shard(path, split, cursor)
        except TokenMismatch:
            self.context.log(
                f"{path.name}: gigatoken and tiktoken gave different tokens for a document; rewriting this shard with "
                f"tiktoken, and using tiktoken from here on"
            )
            self.stream.seek(cursor, reopen=True)
            return self._write_shard(path, split, cursor)

    def _write_shard(self, path: Path, split: str, cursor: Cursor) -> ShardEntry | None:
        self.stream.seek(cursor)
        self.stream.engine.begin_shard()
        if self.stream.peek() is None:
            return None

        # An old entry could describe files that are about to change.
        path.with_suffix(".json").unlink(missing_ok=True)
        counts = ShardCounts(cursor, split)

        def counted_tokens() -> Iterator[Tokens]:
            for document in shard_documents(self.stream, cursor, self.limits):
                counts.add(document)
                self._report(counts)
                yield document.tokens

        header = write_shard(path, counted_tokens(), self.context.tokenizer.dtype)
        end = counts.cursor
        entry = ShardEntry(
            file=path.name,
            split=split,
            tokens=header.tokens,
            documents=header.documents or 0,
            bytes=path.stat().st_size,
            sha256=sha256_file(path),
            idx_sha256=sha256_file(index_path(path)),
            source=f"part {self.number}, records {cursor.records} to {end.records}",
            start=cursor.records,
            cursor=end,
            cut=self.limits.tokens_left(end) == 0,
            origin=self.origin,
            text_bytes=counts.text_bytes,
            repaired=counts.repaired,
            histogram=length_histogram(path),
            errors=tuple(counts.errors[:MAX_LISTED_ERRORS]),
        )
        write_json(path.with_suffix(".json"), entry.to_json())
        self._text_bytes += entry.text_bytes
        return entry

    def _report(self, counts: ShardCounts) -> None:
        now = time.monotonic()
        if now - self._last_report < REPORT_SECONDS:
            return
        self._last_report = now
        cursor = counts.cursor
        documents = cursor.records - sum(cursor.skipped.values())
        text_bytes = self._text_bytes + counts.text_bytes
        self.context.report(PartProgress(self.number, cursor.tokens, documents, text_bytes))


def remove_shards(out: OutputDir, part: int, keep: set[str]) -> None:
    """Remove the shards of a part that are not in ``keep``."""
    for name in sorted(out.shards_on_disk() - keep):
        if part_number(name) == part:
            remove_shard(out.root / name)


def remove_shard(path: Path) -> None:
    """Remove a shard, its entry first, so that no entry ever describes missing files."""
    for file in (path.with_suffix(".json"), index_path(path), path):
        file.unlink(missing_ok=True)


def length_histogram(path: Path) -> tuple[int, ...]:
    """Count the documents of a shard that have 1, 2 to 3, 4 to 7, … tokens."""
    lengths = np.diff(read_ends(path).astype(np.int64), prepend=0)
    return tuple(np.bincount(np.frexp(lengths)[1] - 1).tolist())


def make_part(context: PreprocessContext, engine: Engine, number: int, max_tokens: int | None) -> FinishedPart:
    """Return a part, written first if it is missing or incomplete; one process at a time works on it.

    ``max_tokens``: the most tokens that are needed. Raises BadInput (a damaged record, a folder with another origin),
    ExternalFailure, OSError and StopRequested; the same call then continues.
    """
    lock = Lock(context.out.lock(number))
    if not lock.acquire():
        context.log(f"part {number}: another process is working on it in {context.out.root}; waiting for it to finish")
        lock.acquire(wait=True)
    try:
        part = read_finished_part(context, number)
        if part is not None and part.matches_budget(max_tokens):
            return part
        for partial in context.out.temporary_files(number):
            partial.unlink(missing_ok=True)
        context.out.part(number).unlink(missing_ok=True)
        return PartWriter(context, engine, number, max_tokens).write()
    finally:
        lock.release()


def read_finished_part(context: PreprocessContext, number: int) -> FinishedPart | None:
    """Read a finished part of the same origin; None if it is unfinished or lacks files."""
    part = read_part(context.out, number)
    if part is None or part.origin != context.origin or not part.has_complete_files(context.out.root):
        return None
    return part
