"""Local files as a source: which files the globs mean, in which order, and how they are cut into parts.

The order is by the sha256 of each file's path below its glob's fixed part: the
same on every machine, and a fair mix, so that the first documents can serve as
validation and a budget does not take one folder only.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from amlaunch.preprocess.sources.file_parts import File, Slice, cut, kind
from amlaunch.preprocess.sources.readers import check_encoding, read
from amlaunch.preprocess.sources.records import Record
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Preprocess


@dataclass(frozen=True)
class LocalFile:
    """A file that a glob matched."""

    path: Path
    name: str
    """Its path below the glob's fixed part, with ``/``."""
    size: int

    @property
    def place(self) -> str:
        """Its path."""
        return str(self.path)

    def open(self) -> IO[bytes]:
        """Its bytes."""
        return open(self.path, "rb")


@dataclass(frozen=True)
class LocalFiles:
    """The matched files, cut into parts."""

    files: tuple[LocalFile, ...]
    parts: tuple[tuple[Slice, ...], ...]
    options: Preprocess

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each part."""
        return [sum(piece.end - piece.begin for piece in part) for part in self.parts]

    def identity(self) -> dict[str, Any]:
        """Names and sizes of all files, and how they are read; not where they lie, nor their times."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{file.size}\n".encode("utf-8", "surrogateescape"))
        return {
            "kind": "files",
            "files": len(self.files),
            "digest": digest.hexdigest()[:16],
            **reading(self.files, self.options),
        }

    def records(self, part: int, skip: int) -> Iterator[Record]:
        """The records of a part, its slices one after another."""
        return records_of(self.parts[part], self.options, skip)


def reading(files: Sequence[File], options: Preprocess) -> dict[str, str]:
    """Options that decide what is read from files of these kinds."""
    kinds = {kind(file.name) for file in files}
    how = {"text_column": options.text_column} if kinds != {"text"} else {}
    if "text" in kinds:
        how |= {"encoding": options.encoding, "encoding_errors": options.encoding_errors}
    return how


def records_of(pieces: Sequence[Slice], options: Preprocess, skip: int) -> Iterator[Record]:
    """The records of slices, one after another, without the first ``skip``."""
    for piece in pieces:
        if skip and kind(piece.file.name) == "text":  # each is one record, and need not be read
            skip -= 1
            continue
        for record in read(piece, options):
            if skip:
                skip -= 1
            else:
                yield record


def open_files(options: Preprocess) -> LocalFiles:
    """The files that ``data_files`` matches. Raises BadInput where a pattern matches nothing."""
    check_encoding(options.encoding)
    files = find_files(_as_list(options.data_files), _as_list(options.exclude))
    return LocalFiles(tuple(files), tuple(cut(files, options)), options)


def _as_list(patterns: Sequence[str] | str | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def find_files(patterns: Sequence[str], exclude: Sequence[str]) -> list[LocalFile]:
    """The files that match, each once, in the source's order. Raises BadInput for a pattern without a match.

    Links, loops of them too, can lead to a file under many names: the shortest stands for it.
    """
    found: dict[str, LocalFile] = {}
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


def matching(pattern: str) -> Iterator[LocalFile]:
    """The files that a glob matches; ``**`` is any number of folders."""
    expanded = os.path.expanduser(pattern)
    root = fixed_part(expanded)
    for name in glob.iglob(expanded, recursive=True):
        path = Path(name)
        if path.is_file():
            below = os.path.relpath(path, root).replace(os.sep, "/")
            yield LocalFile(path.absolute(), below, path.stat().st_size)


def fixed_part(pattern: str) -> Path:
    """The folder in front of the first wildcard: ``/data/web`` of ``/data/web/**/*.txt``."""
    parts = Path(pattern).parts
    wild = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return Path(*parts[:wild])


def excluded(file: LocalFile, pattern: str, exclude: Sequence[str]) -> bool:
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
