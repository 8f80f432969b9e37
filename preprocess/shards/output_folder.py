"""The files of an output folder: their names, and the records of finished shards and parts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from amlaunch.preprocess.shards.shard_format import INDEX_ITEM_BYTES, MANIFEST, index_path
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import fingerprint, read_json
from amlaunch.recipes.version import VERSION

PART_VERSION = 2
MAX_LISTED_ERRORS = 100
"""Damaged records that a shard's entry lists; further ones are only counted."""


@dataclass(frozen=True)
class OutputDir:
    """Every file name of a folder of shards."""

    root: Path

    def shard(self, split: str, part: int, number: int) -> Path:
        """Return the path of a shard's tokens; its ``.idx`` and ``.json`` lie beside it."""
        return self.root / f"{split}-{part:05d}-{number:05d}.bin"

    def part(self, part: int) -> Path:
        """Return the path of a finished part's record (shards and totals); no file until the part is finished."""
        return self.root / f"part-{part:05d}.json"

    def element(self, element: int) -> Path:
        """Return the path of an element's record; no file until all its needed parts are finished."""
        return self.root / f"element-{element:05d}.json"

    def origin(self, element: int) -> Path:
        """Return the path of an element's origin: source, tokenizer and options, written before its first shard."""
        return self.root / f"origin-{element:05d}.json"

    def origins(self) -> Iterator[Path]:
        """Yield the origin files of all elements that ever started in this folder."""
        return iter(sorted(self.root.glob("origin-*.json")))

    def lock(self, part: int) -> Path:
        """Return the path of the lock that the process working on a part holds."""
        return self.root / f".lock-{part:05d}"

    @property
    def manifest(self) -> Path:
        """The manifest, which the trainer reads."""
        return self.root / MANIFEST

    def temporary_files(self, part: int | None = None) -> Iterator[Path]:
        """Yield the partial files that a killed process left of this part; None: of all parts.

        Partial files of other parts may belong to a process that is at work beside this one.
        """
        number = r"\d{5,}" if part is None else f"{part:05d}"
        pattern = re.compile(rf"\.((train|val)-{number}-|part-{number}\.).*\.tmp")
        return (path for path in self.root.glob(".*.tmp") if pattern.fullmatch(path.name))

    def shards_on_disk(self) -> set[str]:
        """Return the names of all ``.bin`` files that are named like shards."""
        return {path.name for path in self.root.glob("*.bin") if re.fullmatch(r"(train|val)-\d+-\d+\.bin", path.name)}


def part_number(name: str) -> int:
    """Return the part of a shard, from its file name."""
    return int(name.split("-")[1])


class Cursor(NamedTuple):
    """A position in a part, between two documents. The cursor of a finished shard is where the next one begins."""

    records: int
    """Records of the part before this position, including those without a document."""
    train: int
    """Training tokens before this position."""
    val: int
    """Validation tokens before this position."""
    skipped: Mapping[str, int]
    """Records without a document, by reason."""

    @property
    def tokens(self) -> int:
        """Tokens of both splits."""
        return self.train + self.val

    def after(self, split: str, tokens: int, records: int, skipped: Mapping[str, int]) -> Cursor:
        """Return the cursor after ``tokens`` more tokens of ``split``; ``records`` and ``skipped`` are totals."""
        if split == "val":
            return Cursor(records, self.train, self.val + tokens, skipped)
        return Cursor(records, self.train + tokens, self.val, skipped)


START_CURSOR = Cursor(0, 0, 0, {})


@dataclass(frozen=True)
class ShardEntry:
    """A finished shard, as its ``.json``, its part and the manifest list it."""

    file: str
    split: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    idx_sha256: str
    source: str
    """Part and records of the source that it holds."""
    start: int
    """Records of the part before its first document."""
    cursor: Cursor
    """The end of the shard."""
    cut: bool
    """True if the budget ended it; with a larger budget it would hold more."""
    origin: str
    """Fingerprint of its part's origin: source, tokenizer and options."""
    text_bytes: int
    """Size of its documents' text in UTF-8."""
    repaired: int
    """Documents in which U+FFFD replaced lone surrogates."""
    histogram: tuple[int, ...]
    """Documents of 1, 2 to 3, 4 to 7, 8 to 15, … tokens."""
    errors: tuple[str, ...] = ()
    """Damaged records left out before or among its documents, at most ``MAX_LISTED_ERRORS``."""
    created_by: str = f"amlaunch {VERSION}"

    def to_json(self) -> dict[str, Any]:
        """Return the contents of the shard's ``.json``."""
        return asdict(self) | {"cursor": self.cursor._asdict()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ShardEntry:
        """Parse the contents of a ``.json``. Raises KeyError or TypeError if it is not a shard entry."""
        lists = {name: tuple(value[name]) for name in ("histogram", "errors")}
        return cls(**{**value, **lists, "cursor": Cursor(**value["cursor"])})

    def has_complete_files(self, folder: Path) -> bool:
        """Return True if both files exist with the expected size.

        A cheap check; :mod:`amlaunch.preprocess.stages.verify` reads every byte.
        """
        path = folder / self.file
        try:
            index_size = index_path(path).stat().st_size
            return path.stat().st_size == self.bytes and index_size == INDEX_ITEM_BYTES * self.documents
        except OSError:
            return False


def read_entry(path: Path) -> ShardEntry | None:
    """Read the entry beside the shard ``path``; None if the shard is unfinished (entry missing or unreadable)."""
    try:
        value = read_json(path.with_suffix(".json"))
        return None if value is None else ShardEntry.from_json(value)
    except (ValueError, TypeError, KeyError):
        return None


@dataclass(frozen=True)
class FinishedPart:
    """A finished part: its shards, and how far into the part they reach."""

    number: int
    origin: dict[str, Any]
    """Source, tokenizer and options that the shards were made from."""
    shards: tuple[ShardEntry, ...]
    cursor: Cursor
    complete: bool
    """True if the shards hold the entire part; False if the budget ended it."""
    errors: tuple[str, ...] = ()
    """Damaged records left out after the last document."""

    @property
    def documents(self) -> int:
        """Documents of both splits."""
        return sum(entry.documents for entry in self.shards)

    @property
    def text_bytes(self) -> int:
        """Size of the documents' text in UTF-8."""
        return sum(entry.text_bytes for entry in self.shards)

    def matches_budget(self, tokens_left: int | None) -> bool:
        """Return True if a run with ``tokens_left`` tokens of its budget left (None: no budget) would end here."""
        if tokens_left is None:
            return self.complete
        return self.cursor.tokens == tokens_left or (self.complete and self.cursor.tokens < tokens_left)

    def has_complete_files(self, folder: Path) -> bool:
        """Return True if all its files exist with the expected sizes."""
        return all(entry.has_complete_files(folder) for entry in self.shards)

    def agrees_with_shards(self) -> bool:
        """Return True if its totals and origin agree with its shards' entries."""
        tokens = {"train": 0, "val": 0}
        for entry in self.shards:
            tokens[entry.split] += entry.tokens
        if tokens != {"train": self.cursor.train, "val": self.cursor.val}:
            return False
        return {entry.origin for entry in self.shards} <= {fingerprint(self.origin)}

    def to_json(self) -> dict[str, Any]:
        """Return the contents of ``part-*.json``."""
        return {
            "version": PART_VERSION,
            "part": self.number,
            "tokens": self.cursor.tokens,
            "documents": self.documents,
            "cursor": self.cursor._asdict(),
            "complete": self.complete,
            "errors": self.errors,
            "origin": self.origin,
            "shards": [entry.to_json() for entry in self.shards],
        }


def read_part(out: OutputDir, number: int) -> FinishedPart | None:
    """Read a part's record; None if the part is unfinished or the record is damaged (the next run rewrites it).

    Raises BadInput for a part written by another version.
    """
    path = out.part(number)
    try:
        value = read_json(path)
        if value is None:
            return None
        if value["version"] != PART_VERSION:
            raise BadInput(
                f"{path}: written by another version of amlaunch. Remove {out.root}, or set another "
                f"preprocess.output_dir"
            )
        shards = tuple(ShardEntry.from_json(entry) for entry in value["shards"])
        cursor = Cursor(**value["cursor"])
        part = FinishedPart(number, value["origin"], shards, cursor, value["complete"], tuple(value["errors"]))
        return part if part.agrees_with_shards() else None
    except (ValueError, TypeError, KeyError):
        return None
