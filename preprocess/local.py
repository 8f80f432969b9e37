"""Local files as a source: which files the globs mean, in which order, and which part is an element's.

The order is by the sha256 of each file's path below its glob's fixed part: the
same on every machine, and a fair mix, so that the first documents can serve as
validation and a budget does not take one folder only.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from preprocess.readers import (
    check_encoding,
    count_json,
    count_parquet,
    read_json_lines,
    read_parquet,
    read_text,
    row_groups,
)
from preprocess.sources import Record
from recipes.errors import BadInput
from recipes.schema import Preprocess

FILES_ENOUGH = 16
"""Parquet files an element from which on whole files balance well, and nobody need read every footer."""


@dataclass(frozen=True)
class File:
    """A file that a glob matched."""

    path: Path
    name: str
    """Its path below the glob's fixed part, with ``/``."""
    size: int

    @property
    def kind(self) -> str:
        """``parquet``, ``jsonl`` or ``text``, by the ending."""
        if self.name.endswith((".jsonl", ".jsonl.gz")):
            return "jsonl"
        return "parquet" if self.name.endswith(".parquet") else "text"


@dataclass(frozen=True)
class Piece:
    """What is never divided between elements: a file, or a few row groups of a Parquet file."""

    file: File
    size: int
    groups: range | None = None
    """None: all."""


@dataclass(frozen=True)
class LocalFiles:
    """One element's pieces of the matched files."""

    files: tuple[File, ...]
    pieces: tuple[Piece, ...]
    column: str
    encoding: str
    encoding_errors: str

    def identity(self) -> dict[str, Any]:
        """Names and sizes of all files, and how they are read; not where they lie, nor their times."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file.size}\n".encode("utf-8", "surrogateescape"))
        kinds = {file.kind for file in self.files}
        how = {"text_column": self.column} if kinds != {"text"} else {}
        if "text" in kinds:
            how |= {"encoding": self.encoding, "encoding_errors": self.encoding_errors}
        return {"kind": "files", "files": len(self.files), "digest": digest.hexdigest()[:16], **how}

    def records(self, skip: int) -> Iterator[Record]:
        """The records of the pieces in order, without the first ``skip``."""
        for piece in self.pieces:
            if skip and (here := self._count(piece)) <= skip:
                skip -= here
                continue
            yield from self._read(piece, skip)
            skip = 0

    def _count(self, piece: Piece) -> int:
        if piece.file.kind == "parquet":
            return count_parquet(piece.file.path, piece.groups)
        return count_json(piece.file.path) if piece.file.kind == "jsonl" else 1

    def _read(self, piece: Piece, skip: int) -> Iterator[Record]:
        path = piece.file.path
        if piece.file.kind == "parquet":
            return read_parquet(path, self.column, piece.groups, skip)
        if piece.file.kind == "jsonl":
            return read_json_lines(path, self.column, skip)
        return read_text(path, self.encoding, self.encoding_errors)


def open_files(options: Preprocess, index: int) -> LocalFiles:
    """Element ``index``'s part of the files that ``data_files`` matches.

    Raises BadInput where a pattern matches nothing, or there is less to share than elements.
    """
    check_encoding(options.encoding)
    files = find_files(_as_list(options.data_files), _as_list(options.exclude))
    pieces = cut_pieces(files, options.elements)
    if len(pieces) < options.elements:
        raise BadInput(
            f"preprocess.elements: {options.elements} elements, but only {len(pieces)} files (or Parquet row groups) "
            f"to share between them: set it to at most {len(pieces)}"
        )
    part = partition([piece.size for piece in pieces], options.elements)[index]
    mine = tuple(pieces[i] for i in part)
    return LocalFiles(tuple(files), mine, options.text_column, options.encoding, options.encoding_errors)


def _as_list(patterns: Sequence[str] | str | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def find_files(patterns: Sequence[str], exclude: Sequence[str]) -> list[File]:
    """The files that match, each once, in the source's order. Raises BadInput for a pattern without a match.

    Links, loops of them too, can lead to a file under many names: the shortest stands for it.
    """
    found: dict[str, File] = {}
    for pattern in patterns:
        matches = [file for file in matching(pattern) if not excluded(file, pattern, exclude)]
        if not matches:
            raise BadInput(_no_match(pattern, exclude))
        for file in matches:
            real = os.path.realpath(file.path)
            found[real] = min(file, found.get(real, file), key=lambda file: (len(file.name), file.name))
    return sorted(found.values(), key=lambda file: (_sha256(file.name), str(file.path)))


def _sha256(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def _no_match(pattern: str, exclude: Sequence[str]) -> str:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return f"preprocess.data_files: {pattern} is a folder: write which files in it, such as {path / '**' / '*.txt'}"
    ruled_out = " that exclude leaves in" if exclude else ""
    return f"preprocess.data_files: no file{ruled_out} matches {pattern!r} (from {Path.cwd()})"


def matching(pattern: str) -> Iterator[File]:
    """The files that a glob matches; ``**`` is any number of folders."""
    expanded = os.path.expanduser(pattern)
    root = fixed_part(expanded)
    for name in glob.iglob(expanded, recursive=True):
        path = Path(name)
        if path.is_file():
            below = os.path.relpath(path, root).replace(os.sep, "/")
            yield File(path.absolute(), below, path.stat().st_size)


def fixed_part(pattern: str) -> Path:
    """The folder in front of the first wildcard: ``/data/web`` of ``/data/web/**/*.txt``."""
    parts = Path(pattern).parts
    wild = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:wild])


def excluded(file: File, pattern: str, exclude: Sequence[str]) -> bool:
    """Whether a glob of ``exclude`` means the file.

    An absolute one is held against the whole path; a relative one against the
    end of the path below the fixed part of ``pattern`` (so folders above the
    corpus never matter), and of a relative ``pattern``'s path as written.
    """
    fixed = fixed_part(os.path.expanduser(pattern))
    written = file.name if fixed.is_absolute() else (fixed / file.name).as_posix()
    for glob_ in map(os.path.expanduser, exclude):
        if os.path.isabs(glob_) and re.fullmatch(glob_regex(glob_), file.path.as_posix()):
            return True
        if not os.path.isabs(glob_) and re.fullmatch("(?:.*/)?" + glob_regex(glob_), written):
            return True
    return False


def glob_regex(pattern: str) -> str:
    """A glob as a regular expression: ``**`` crosses folders, ``*`` and ``?`` do not (glob.translate is Python 3.13's)."""
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    return "".join(
        wild.get(token) or (_character_set(token) if i % 2 else re.escape(token)) for i, token in enumerate(tokens)
    )


def _character_set(token: str) -> str:
    inside = token[1:-1].replace("\\", "\\\\").replace("[", "\\[")
    return f"[^{inside[1:]}]" if inside.startswith("!") else f"[{inside}]"


def cut_pieces(files: Iterable[File], elements: int) -> list[Piece]:
    """The files in order, Parquet ones by row group where they are too few to balance as they are."""
    files = list(files)
    whole = elements == 1 or len(files) >= FILES_ENOUGH * elements
    pieces: list[Piece] = []
    for file in files:
        if whole or file.kind != "parquet":
            pieces.append(Piece(file, file.size))
        else:
            groups = row_groups(file.path)
            pieces += [Piece(file, size, range(i, i + 1)) for i, (_, size) in enumerate(groups)]
    return pieces


def partition(sizes: Sequence[int], parts: int) -> list[range]:
    """Contiguous ranges over ``sizes``, none empty, as even in bytes as whole pieces allow (``len(sizes) >= parts``).

    A piece belongs to the part in which its middle lies.
    """
    weights = [size + 1 for size in sizes]  # an empty file is work too
    total = sum(weights)
    doubled_middles = [2 * end - weight for end, weight in zip(accumulate(weights), weights, strict=True)]
    cuts = [0]
    for part in range(1, parts):
        cut = bisect_left(doubled_middles, -(-2 * total * part // parts))
        cuts.append(min(max(cut, cuts[-1] + 1), len(sizes) - (parts - part)))
    return [range(a, b) for a, b in zip(cuts, [*cuts[1:], len(sizes)], strict=True)]
