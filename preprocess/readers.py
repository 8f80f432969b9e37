"""Records out of a local file: text, JSON lines, Parquet.

Each kind of file counts its records cheaply (``count_*``), so that a restart
need not decode what it already has, and reads them from any record on (``read_*``).
"""

from __future__ import annotations

import gzip
import io
import json
import tokenize
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from preprocess.sources import Record, Skipped
from recipes.errors import BadInput, did_you_mean

PYTHON = "python"
"""As an encoding: what a Python source file says of itself (PEP 263)."""
BATCH_ROWS = 256


class Undecodable(ValueError):
    """Bytes that are not text in the encoding; the message says which byte."""


def check_encoding(name: str) -> None:
    """Raise BadInput unless ``name`` is ``python`` or one of Python's text encodings."""
    try:
        if name != PYTHON:
            "x".encode(name)  # unlike codecs.lookup, refuses those that are not for text
    except (LookupError, ValueError):
        from encodings.aliases import aliases

        known = [PYTHON, *aliases, *(alias.replace("_", "-") for alias in aliases.values())]
        raise BadInput(
            f"preprocess.encoding: Python knows no text encoding {name!r}: {did_you_mean(name, known)}"
        ) from None


def decode(data: bytes, encoding: str, errors: str) -> str:
    """The text of ``data``, newlines untouched. Raises Undecodable unless ``errors`` is ``replace``."""
    lenient = errors == "replace"
    try:
        codec = declared_encoding(data, lenient) if encoding == PYTHON else encoding
        return data.decode(codec, "replace" if lenient else "strict")
    except UnicodeDecodeError as error:
        raise Undecodable(f"byte offset {error.start} is not {error.encoding} ({error.reason})") from None
    except (LookupError, UnicodeError) as error:  # a coding line may name a codec that is none for text, or idna
        raise Undecodable(str(error)) from None


def declared_encoding(data: bytes, lenient: bool) -> str:
    """The encoding of a Python source file by its first two lines; UTF-8 where it says nothing.

    A line that cannot be followed is an Undecodable error, or UTF-8 where ``lenient``.
    """
    try:
        return tokenize.detect_encoding(io.BytesIO(data).readline)[0]
    except SyntaxError as error:
        if not lenient:
            data.decode("utf-8")  # where that is what is wrong, it says at which byte
            raise Undecodable(str(error)) from None
        return "utf-8"


def read_text(path: Path, encoding: str, errors: str) -> Iterator[Record]:
    """The one record of a text file. Raises BadInput with file and byte where it cannot be decoded strictly."""
    try:
        yield decode(path.read_bytes(), encoding, errors)
    except Undecodable as error:
        if errors == "skip":
            yield Skipped("undecodable")
            return
        raise BadInput(
            f"{path}: {error}: set preprocess.encoding to the file's own (python: by its coding line), "
            f"preprocess.encoding_errors to skip or replace, or exclude the file"
        ) from None


def json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a JSONL file that are not blank, with their numbers (from 1). Raises BadInput for a broken gzip."""
    try:
        with _open_lines(path) as handle:
            for number, line in enumerate(handle, 1):
                if not line.isspace():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadInput(f"{path}: damaged or truncated gzip ({error})") from None


def _open_lines(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb")  # type: ignore[return-value]


def count_json(path: Path) -> int:
    """How many records a JSONL file has."""
    return sum(1 for _ in json_lines(path))


def read_json_lines(path: Path, column: str, skip: int) -> Iterator[Record]:
    """The records of a JSONL file after the first ``skip``. Raises BadInput with file and line for a bad one."""
    for number, line in islice(json_lines(path), skip, None):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise BadInput(f"{where}: a JSON object is expected on each line, found {type(row).__name__}")
        if column not in row:
            raise BadInput(no_column(where, column, row))
        yield record(where, column, row[column])


def record(where: str, column: str, value: Any) -> Record:
    """A column's value as a record. Raises BadInput where it is neither a string nor null."""
    if value is None:
        return Skipped("null")
    if not isinstance(value, str):
        raise BadInput(f"{where}: column {column!r} holds {type(value).__name__}, not text")
    return value


def no_column(where: str, column: str, known: Iterable[str]) -> str:
    """What to say where a source has no such column."""
    return f"{where}: no column {column!r} (preprocess.text_column): {did_you_mean(column, known)}"


def open_parquet(path: Path) -> Any:
    """A ``pyarrow.parquet.ParquetFile``. Raises BadInput where pyarrow is missing or the file is none."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        raise BadInput(f'{path}: reading Parquet needs pyarrow: pip install "amlaunch[preprocess]"') from None
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError) as error:
        raise BadInput(f"{path}: not a whole Parquet file ({error})") from None


def row_groups(path: Path) -> list[tuple[int, int]]:
    """Rows and bytes of each row group of a Parquet file."""
    with open_parquet(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]


def count_parquet(path: Path, groups: range | None) -> int:
    """How many records the given row groups hold (None: all)."""
    rows = [rows for rows, _ in row_groups(path)]
    return sum(rows[i] for i in (groups or range(len(rows))))


def read_parquet(path: Path, column: str, groups: range | None, skip: int) -> Iterator[Record]:
    """The records of the given row groups (None: all) after the first ``skip``, one column read, a batch at a time.

    Raises BadInput for a missing or non-text column and for a damaged file.
    """
    import pyarrow as arrow

    with open_parquet(path) as file:
        if column not in file.schema_arrow.names:
            raise BadInput(no_column(str(path), column, file.schema_arrow.names))
        wanted = list(groups or range(file.metadata.num_row_groups))
        while wanted and (rows := file.metadata.row_group(wanted[0]).num_rows) <= skip:
            skip -= rows
            wanted.pop(0)
        if not wanted:
            return
        try:
            batches = file.iter_batches(BATCH_ROWS, row_groups=wanted, columns=[column])
            yield from islice(_column_records(path, column, batches), skip, None)
        except (arrow.ArrowInvalid, OSError) as error:
            if getattr(error, "errno", None):  # the disk's word, not the decoder's
                raise
            raise BadInput(f"{path}: damaged Parquet ({error})") from None


def _column_records(path: Path, column: str, batches: Iterable[Any]) -> Iterator[Record]:
    for batch in batches:
        for value in batch.column(0).to_pylist():
            yield record(str(path), column, value)
