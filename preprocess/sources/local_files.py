"""Local files as a source: the files that globs match, their order, and their parts.

The order is by the sha256 of each file's path below its glob's root: the same on every machine, and a fair mix, so that
the first documents can serve as validation and a budget does not take one folder only.
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

from amlaunch.preprocess.sources.file_parts import FileSlice, SourceFile, cut_into_parts, file_format
from amlaunch.preprocess.sources.readers import check_encoding, read_slice
from amlaunch.preprocess.sources.records import Record
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Preprocess


@dataclass(frozen=True)
class LocalFile:
    """A file that a glob matched."""

    path: Path
    name: str
    """Path below the glob's root, with ``/``."""
    size: int

    @property
    def location(self) -> str:
        """Its path."""
        return str(self.path)

    def open(self) -> IO[bytes]:
        """Open it for reading bytes."""
        return open(self.path, "rb")


@dataclass(frozen=True)
class LocalFiles:
    """The matched files, cut into parts."""

    files: tuple[LocalFile, ...]
    parts: tuple[tuple[FileSlice, ...], ...]
    options: Preprocess

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each part."""
        return [sum(file_slice.size for file_slice in part) for part in self.parts]

    def identity(self) -> dict[str, Any]:
        """Describe the names and sizes of all files and how they are read, but not their folder or times."""
        return {
            "kind": "files",
            "files": len(self.files),
            "digest": listing_digest((file.name, file.size) for file in self.files),
            **reading_options(self.files, self.options),
        }

    def records(self, part: int, skip: int) -> Iterator[Record]:
        """Yield the records of a part without the first ``skip``."""
        return read_records(self.parts[part], self.options, skip)


def listing_digest(files: Iterator[tuple[str, int]]) -> str:
    """Return sixteen hex digits that stand for the names and sizes of files, in order."""
    listing = "".join(f"{name}\0{size}\n" for name, size in files)
    return hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def reading_options(files: Sequence[SourceFile], options: Preprocess) -> dict[str, str]:
    """Return the options that affect how files of these formats are read."""
    formats = {file_format(file.name) for file in files}
    relevant = {"text_column": options.text_column} if formats != {"text"} else {}
    if "text" in formats:
        relevant |= {"encoding": options.encoding, "encoding_errors": options.encoding_errors}
    return relevant


def read_records(slices: Sequence[FileSlice], options: Preprocess, skip: int) -> Iterator[Record]:
    """Yield the records of slices, in order, without the first ``skip``."""
    for file_slice in slices:
        # A text file is a single record, so that it can be skipped without being read.
        if skip and file_format(file_slice.file.name) == "text":
            skip -= 1
            continue
        for record in read_slice(file_slice, options):
            if skip:
                skip -= 1
            else:
                yield record


def open_files(options: Preprocess) -> LocalFiles:
    """Open the files that ``data_files`` matches. Raises BadInput if a pattern matches nothing."""
    check_encoding(options.encoding)
    files = find_files(_as_list(options.data_files), _as_list(options.exclude))
    return LocalFiles(tuple(files), tuple(cut_into_parts(files, options)), options)


def _as_list(patterns: Sequence[str] | str | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def find_files(patterns: Sequence[str], exclude: Sequence[str]) -> list[LocalFile]:
    """Find the matching files, each once, in the source's order. Raises BadInput for a pattern without a match.

    Links, and even loops of them, can give a file many names: the shortest is used.
    """
    files: dict[str, LocalFile] = {}
    for pattern in patterns:
        matches = list(glob_files(pattern))
        included = [file for file in matches if not is_excluded(file, pattern, exclude)]
        if not matches:
            raise BadInput(_no_match_message(pattern))
        if not included:
            raise BadInput(f"preprocess.exclude: excludes every file that matches {pattern!r}")
        for file in included:
            real_path = os.path.realpath(file.path)
            files[real_path] = min(file, files.get(real_path, file), key=lambda file: (len(file.name), file.name))
    return sorted(files.values(), key=lambda file: (_sha256(file.name), str(file.path)))


def _sha256(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def _no_match_message(pattern: str) -> str:
    path = Path(pattern).expanduser()
    if path.is_dir():
        return f"preprocess.data_files: {pattern} is a folder. Name the files in it, such as {path / '**' / '*.txt'}"
    return f"preprocess.data_files: no file matches {pattern!r} (working directory: {Path.cwd()})"


def glob_files(pattern: str) -> Iterator[LocalFile]:
    """Yield the files that a glob matches; ``**`` matches any number of folders."""
    expanded = os.path.expanduser(pattern)
    root = glob_root(expanded)
    for name in glob.iglob(expanded, recursive=True):
        path = Path(name)
        if path.is_file():
            relative = os.path.relpath(path, root).replace(os.sep, "/")
            yield LocalFile(path.absolute(), relative, path.stat().st_size)


def glob_root(pattern: str) -> Path:
    """Return the folder before the first wildcard: ``/data/web`` for ``/data/web/**/*.txt``."""
    components = Path(pattern).parts
    wildcards = (i for i, component in enumerate(components) if glob.has_magic(component))
    return Path(*components[: next(wildcards, len(components) - 1)])


def is_excluded(file: LocalFile, pattern: str, exclude: Sequence[str]) -> bool:
    """Return True if a glob of ``exclude`` matches the file that ``pattern`` matched.

    An absolute glob is compared with the full path. A relative glob is compared with the end of the path below the root
    of ``pattern`` (so that folders above the corpus never matter), or of the path as written if ``pattern`` is
    relative.
    """
    root = glob_root(os.path.expanduser(pattern))
    relative = file.name if root.is_absolute() else (root / file.name).as_posix()
    for excluded in map(os.path.expanduser, exclude):
        if os.path.isabs(excluded):
            if re.fullmatch(glob_regex(excluded), file.path.as_posix()):
                return True
        elif re.fullmatch("(?:.*/)?" + glob_regex(excluded), relative):
            return True
    return False


def glob_regex(pattern: str) -> str:
    """Translate a glob to a regular expression: ``**`` crosses folders, ``*`` and ``?`` do not.

    Python has ``glob.translate`` since 3.13.
    """
    wildcards = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)

    regex = ""
    for i, token in enumerate(tokens):
        if token in wildcards:
            regex += wildcards[token]
        elif i % 2:
            regex += _character_set(token)
        else:
            regex += re.escape(token)
    return regex


def _character_set(token: str) -> str:
    characters = token[1:-1].replace("\\", "\\\\").replace("[", "\\[")
    return f"[^{characters[1:]}]" if characters.startswith("!") else f"[{characters}]"
