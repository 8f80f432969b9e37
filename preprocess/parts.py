"""What lies in an output folder: the names, and what each shard and each finished part says of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from preprocess.shards import MANIFEST, index_path
from recipes.errors import BadInput
from recipes.files import fingerprint, read_json

PART_VERSION = 1


@dataclass(frozen=True)
class OutputDir:
    """Every file name of a folder of shards."""

    root: Path

    def shard(self, split: str, element: int, number: int) -> Path:
        """The tokens; ``.idx`` and ``.json`` lie beside them."""
        return self.root / f"{split}-{element:05d}-{number:05d}.bin"

    def part(self, element: int) -> Path:
        """Exists only when the element is whole: its shards and totals."""
        return self.root / f"part-{element:05d}.json"

    def origin(self, element: int) -> Path:
        """What the element makes its shards from; written before the first."""
        return self.root / f"origin-{element:05d}.json"

    def origins(self) -> Iterator[Path]:
        """Those of all elements that ever started here."""
        return iter(sorted(self.root.glob("origin-*.json")))

    def lock(self, element: int) -> Path:
        """Held by the process that works on the element."""
        return self.root / f".lock-{element:05d}"

    @property
    def manifest(self) -> Path:
        """What the trainer reads."""
        return self.root / MANIFEST

    def leftovers(self, element: int) -> Iterator[Path]:
        """Half files that a killed process of this element left; those of others, at work beside it, are theirs."""
        own = re.compile(rf"\.((train|val)-{element:05d}-|(part|origin)-{element:05d}\.).*\.tmp")
        return (path for path in self.root.glob(".*.tmp") if own.fullmatch(path.name))


class Cursor(NamedTuple):
    """How far an element is. A whole shard's cursor is where the next one begins."""

    records: int
    """Taken from the element's part of the source, those without a document included."""
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
    start: int
    """Records of the element's stream before its first document."""
    cursor: Cursor
    origin: str
    """Fingerprint of what it was made from."""

    def to_json(self) -> dict[str, Any]:
        """For the ``.json`` files."""
        return asdict(self) | {"cursor": self.cursor._asdict()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ShardEntry:
        """The reverse; KeyError or TypeError where it is something else."""
        return cls(**{**value, "cursor": Cursor(**value["cursor"])})

    def sizes_agree(self, folder: Path) -> bool:
        """Whether both files are there in full length: cheap, where :mod:`preprocess.verify` reads every byte."""
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
    """A finished element."""

    element: int
    origin: dict[str, Any]
    """Options, source and tokenizer that the shards were made from."""
    shards: tuple[ShardEntry, ...]
    cursor: Cursor

    @property
    def documents(self) -> int:
        """In both splits."""
        return sum(entry.documents for entry in self.shards)

    def consistent(self) -> bool:
        """Whether it agrees with what its shards say of themselves."""
        train, val = (sum(entry.tokens for entry in self.shards if entry.split == split) for split in ("train", "val"))
        origins = {entry.origin for entry in self.shards}
        return (train, val) == (self.cursor.train, self.cursor.val) and origins <= {fingerprint(self.origin)}

    def to_json(self) -> dict[str, Any]:
        """For ``part-*.json``."""
        shards = [entry.to_json() for entry in self.shards]
        totals = {"tokens": self.cursor.tokens, "documents": self.documents, "cursor": self.cursor._asdict()}
        return {"version": PART_VERSION, "element": self.element, **totals, "origin": self.origin, "shards": shards}


def read_part(out: OutputDir, element: int) -> Part | None:
    """The finished element; None where it is not finished, or its part file is damaged: the next run writes it again.

    Raises BadInput for a part of another version.
    """
    path = out.part(element)
    try:
        value = read_json(path)
        if value is None:
            return None
        if value["version"] != PART_VERSION:
            raise BadInput(f"{path}: made by another version of amlaunch; remove {out.root} or choose another output_dir")
        shards = tuple(ShardEntry.from_json(entry) for entry in value["shards"])
        part = Part(element, value["origin"], shards, Cursor(**value["cursor"]))
        return part if part.consistent() else None
    except (ValueError, TypeError, KeyError):
        return None
