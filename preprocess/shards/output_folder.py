"""What lies in an output folder: the names, and what each shard and each finished part says of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from amlaunch.preprocess.shards.shard_format import MANIFEST, index_path
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import fingerprint, read_json
from amlaunch.recipes.version import VERSION

PART_VERSION = 2
ERRORS_LISTED = 100
"""Damaged records that a shard's entry lists; the others are counted alone."""


@dataclass(frozen=True)
class OutputDir:
    """Every file name of a folder of shards."""

    root: Path

    def shard(self, split: str, part: int, number: int) -> Path:
        """The tokens; ``.idx`` and ``.json`` lie beside them."""
        return self.root / f"{split}-{part:05d}-{number:05d}.bin"

    def part(self, part: int) -> Path:
        """Exists only when the part is whole: its shards and totals."""
        return self.root / f"part-{part:05d}.json"

    def element(self, element: int) -> Path:
        """Exists only when the element has made all its parts that are needed."""
        return self.root / f"element-{element:05d}.json"

    def origin(self, element: int) -> Path:
        """What the element makes its shards from; written before the first."""
        return self.root / f"origin-{element:05d}.json"

    def origins(self) -> Iterator[Path]:
        """Those of all elements that ever started here."""
        return iter(sorted(self.root.glob("origin-*.json")))

    def lock(self, part: int) -> Path:
        """Held by the process that works on the part."""
        return self.root / f".lock-{part:05d}"

    @property
    def manifest(self) -> Path:
        """What the trainer reads."""
        return self.root / MANIFEST

    def leftovers(self, part: int | None = None) -> Iterator[Path]:
        """Half files that a killed process left of this part; those of others, at work beside it, are theirs. None: of all."""
        number = r"\d{5,}" if part is None else f"{part:05d}"
        own = re.compile(rf"\.((train|val)-{number}-|part-{number}\.).*\.tmp")
        return (path for path in self.root.glob(".*.tmp") if own.fullmatch(path.name))

    def shards_on_disk(self) -> set[str]:
        """Names of all ``.bin`` files that are named as shards are."""
        return {path.name for path in self.root.glob("*.bin") if re.fullmatch(r"(train|val)-\d+-\d+\.bin", path.name)}


class Cursor(NamedTuple):
    """How far a part is. A whole shard's cursor is where the next one begins."""

    records: int
    """Taken from the part, those without a document included."""
    train: int
    """Tokens."""
    val: int
    """Tokens."""
    skipped: Mapping[str, int]
    """Records without a document, by reason."""

    @property
    def tokens(self) -> int:
        """Of both splits."""
        return self.train + self.val

    def after(self, split: str, tokens: int, records: int, skipped: Mapping[str, int]) -> Cursor:
        """The cursor when a document of ``tokens`` tokens went to ``split``."""
        if split == "val":
            return Cursor(records, self.train, self.val + tokens, skipped)
        return Cursor(records, self.train + tokens, self.val, skipped)


START = Cursor(0, 0, 0, {})


@dataclass(frozen=True)
class ShardEntry:
    """A whole shard, as its ``.json``, the part and the manifest list it."""

    file: str
    split: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    idx_sha256: str
    source: str
    """Which records of the source it holds."""
    start: int
    """Records of the part before its first document."""
    cursor: Cursor
    cut: bool
    """Whether the budget ended it: with a larger one it would hold more."""
    origin: str
    """Fingerprint of what it was made from."""
    text_bytes: int
    """Of the documents' text in UTF-8."""
    repaired: int
    """Documents in which U+FFFD took the place of lone surrogates."""
    histogram: tuple[int, ...]
    """Documents of 1, 2 to 3, 4 to 7, 8 to 15, … tokens."""
    errors: tuple[str, ...] = ()
    """Damaged records that were left out before or among its documents, at most ERRORS_LISTED."""
    created_by: str = f"amlaunch {VERSION}"

    def to_json(self) -> dict[str, Any]:
        """For the ``.json`` files."""
        return asdict(self) | {"cursor": self.cursor._asdict()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ShardEntry:
        """The reverse; KeyError or TypeError where it is something else."""
        lists = {name: tuple(value[name]) for name in ("histogram", "errors")}
        return cls(**{**value, **lists, "cursor": Cursor(**value["cursor"])})

    def sizes_agree(self, folder: Path) -> bool:
        """Whether both files are there in full length: cheap, where :mod:`~amlaunch.preprocess.stages.verify` reads every byte."""
        path = folder / self.file
        try:
            return path.stat().st_size == self.bytes and index_path(path).stat().st_size == 8 * self.documents
        except OSError:
            return False


def read_entry(path: Path) -> ShardEntry | None:
    """The entry beside the shard ``path``; None where the shard is not whole (no entry, or one that cannot be read)."""
    try:
        value = read_json(path.with_suffix(".json"))
        return None if value is None else ShardEntry.from_json(value)
    except (ValueError, TypeError, KeyError):
        return None


@dataclass(frozen=True)
class Part:
    """A finished part."""

    part: int
    origin: dict[str, Any]
    """Options, source and tokenizer that the shards were made from."""
    shards: tuple[ShardEntry, ...]
    cursor: Cursor
    complete: bool
    """Whether the part has no more documents; else the budget ended it."""
    errors: tuple[str, ...] = ()
    """Damaged records that were left out behind the last document."""

    @property
    def documents(self) -> int:
        """In both splits."""
        return sum(entry.documents for entry in self.shards)

    def fits(self, limit: int | None) -> bool:
        """Whether it is what a run with so many tokens left would leave."""
        return (
            self.complete
            if limit is None
            else self.cursor.tokens == limit or (self.complete and self.cursor.tokens < limit)
        )

    def whole(self, folder: Path) -> bool:
        """Whether all its files are there in full length."""
        return all(entry.sizes_agree(folder) for entry in self.shards)

    def consistent(self) -> bool:
        """Whether it agrees with what its shards say of themselves."""
        train, val = (sum(entry.tokens for entry in self.shards if entry.split == split) for split in ("train", "val"))
        origins = {entry.origin for entry in self.shards}
        return (train, val) == (self.cursor.train, self.cursor.val) and origins <= {fingerprint(self.origin)}

    def to_json(self) -> dict[str, Any]:
        """For ``part-*.json``."""
        shards = [entry.to_json() for entry in self.shards]
        totals = {"tokens": self.cursor.tokens, "documents": self.documents, "cursor": self.cursor._asdict()}
        rest = {"complete": self.complete, "errors": self.errors, "origin": self.origin, "shards": shards}
        return {"version": PART_VERSION, "part": self.part, **totals, **rest}


def read_part(out: OutputDir, part: int) -> Part | None:
    """The finished part; None where it is not finished, or its file is damaged: the next run writes it again.

    Raises BadInput for a part of another version.
    """
    path = out.part(part)
    try:
        value = read_json(path)
        if value is None:
            return None
        if value["version"] != PART_VERSION:
            raise BadInput(
                f"{path}: made by another version of amlaunch; remove {out.root} or choose another output_dir"
            )
        shards = tuple(ShardEntry.from_json(entry) for entry in value["shards"])
        cursor = Cursor(**value["cursor"])
        found = Part(part, value["origin"], shards, cursor, value["complete"], tuple(value["errors"]))
        return found if found.consistent() else None
    except (ValueError, TypeError, KeyError):
        return None
