"""Records out of a file: text, JSON lines, Parquet; by column and block, not through rows of Python objects."""

from __future__ import annotations

import gzip
import io
import json
import os
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import IO, Any

from amlaunch.preprocess.sources.file_parts import Slice, kind
from amlaunch.preprocess.sources.records import Bad, Record, Skipped
from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.format.schema import Preprocess

PYTHON = "python"
"""As an encoding: what a Python source file says of itself (PEP 263)."""
BLOCK_BYTES = 1 << 20
"""Of text columns that are decoded at once, about."""
LINES_BYTES = 1 << 17
"""Of JSON lines that are read at once: they stay in the cache of a core, and leave room in it for the vocabulary."""
LONG_LINE = 1 << 22
"""From so many bytes on, memory counts for more than a parser's speed: orjson copies what it parses."""
DAMAGED = "damaged file"
M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 4 << 20
"""glibc's name for a block that is mapped on its own, and from how many bytes on."""


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


def read(piece: Slice, options: Preprocess) -> Iterator[Record]:
    """The records of a slice.

    Raises BadInput where the file has no such column, OSError where it cannot be read.
    """
    if kind(piece.file.name) == "parquet":
        return read_parquet(piece, options.text_column, options.chunk_size)
    if kind(piece.file.name) == "jsonl":
        return read_json_lines(piece, options.text_column)
    return read_text(piece, options.encoding, options.encoding_errors)


def read_text(piece: Slice, encoding: str, errors: str) -> Iterator[Record]:
    """The one record of a text file."""
    try:
        with piece.file.open() as handle:
            yield decode(handle.read(), encoding, errors)
    except Undecodable as error:
        if errors == "skip":
            yield Skipped("undecodable")
            return
        yield Bad(
            "undecodable",
            f"{piece.file.place}: {error}: set preprocess.encoding to the file's own (python: by its coding line), "
            f"preprocess.encoding_errors to skip or replace, or exclude the file",
        )


# --- JSON lines ---------------------------------------------------------------------------------------


def read_json_lines(piece: Slice, column: str) -> Iterator[Record]:
    """The records of the lines that begin in the slice, a block of them at a time."""
    place = piece.file.place
    try:
        with piece.file.open() as raw, decompressed(raw, piece.file.name) as handle:
            for offset, lines in line_blocks(handle, piece):
                yield from records_of_lines(piece, offset, lines, column)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield Bad(DAMAGED, f"{place}: damaged or truncated gzip ({error})")
    except OSError as error:
        if error.errno or not piece.file.name.endswith(".zst"):
            raise
        yield Bad(DAMAGED, f"{place}: damaged or truncated zstd ({error})")


def decompressed(raw: IO[bytes], name: str) -> IO[bytes]:
    """What is in a file that may be compressed."""
    if name.endswith(".gz"):
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    if name.endswith(".zst"):
        arrow = import_pyarrow(name)
        return arrow.CompressedInputStream(arrow.PythonFile(raw, mode="r"), "zstd")
    return raw


def line_blocks(handle: IO[bytes], piece: Slice) -> Iterator[tuple[int, list[bytearray]]]:
    """Whole lines, some at a time, with where in the file they begin; only lines that begin in the slice."""
    begin, end = (piece.begin, piece.end) if piece.count > 1 else (0, None)
    if begin:
        handle.seek(begin - 1)
        begin += len(handle.readline()) - 1  # a line that began before is the slice before's
    kept = bytearray()
    while end is None or begin < end:
        data = handle.read(LINES_BYTES)
        searched = len(kept)
        kept += data
        if end is not None and begin + len(kept) >= end:
            cut = kept.find(b"\n", max(end - 1 - begin, 0)) + 1
        else:
            cut = kept.rfind(b"\n", searched) + 1
        if not data:
            cut = len(kept)
        if cut:
            rest = kept[cut:]
            del kept[cut:]
            lines = kept.split(b"\n")
            kept = rest  # a line of 50 MB is there once, now
            yield begin, lines
            begin += cut
        if not data:
            return


def records_of_lines(piece: Slice, offset: int, lines: list[bytearray], column: str) -> Iterator[Record]:
    """The records of lines, the first of which begins at ``offset``; blank lines are none. ``lines`` is used up."""
    loads = fast_json()
    lines.reverse()
    while lines:
        line: Any = lines.pop()
        begin, offset = offset, offset + len(line) + 1
        long = len(line) > LONG_LINE
        if long:
            line = decoded(line)
        try:
            text = (json.loads if long else loads)(line)[column]
        except (ValueError, TypeError, LookupError, RecursionError):
            text = None
        if type(text) is str:
            del line  # while a text of 50 MB is tokenised, it is there once
            yield text
        elif not is_blank(line):  # looked at again, to say what is odd
            yield record_of_line(piece, begin, line, column)


def decoded(line: bytearray) -> bytearray | str:
    """The text of a long line as the standard library reads it, so that the bytes can go before it is parsed; as it is where it is none."""
    try:
        return line.decode(json.detect_encoding(line), "surrogatepass")
    except UnicodeDecodeError:
        return line


def is_blank(line: bytearray | str) -> bool:
    """Whether a line has nothing but ASCII's white space."""
    return not line or (line.isspace() and (isinstance(line, bytearray) or line.isascii()))


def fast_json() -> Callable[[bytearray | str], Any]:
    """orjson's parser where it is installed (the extra ``fast``), else the standard library's.

    orjson takes less for JSON than the standard library does, and gives the same for what it takes; where it
    refuses, :func:`record_of_line` has the last word. So the records do not depend on it.
    """
    try:
        import orjson
    except ImportError:
        return json.loads
    return orjson.loads


def record_of_line(piece: Slice, offset: int, line: bytes | bytearray | str, column: str) -> Record:
    """The record of one line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Bad("not JSON", f"{line_place(piece, offset)}: not valid JSON ({error})")
    if not isinstance(row, dict):
        return Bad(
            "not JSON",
            f"{line_place(piece, offset)}: a JSON object is expected on each line, found {type(row).__name__}",
        )
    if column not in row:
        return Bad("no column", no_column(line_place(piece, offset), column, row))
    value = row[column]
    if value is None:
        return Skipped("null")
    if not isinstance(value, str):
        return Bad("not text", f"{line_place(piece, offset)}: column {column!r} holds {type(value).__name__}, not text")
    return value


def line_place(piece: Slice, offset: int) -> str:
    """``file:line`` of the line that begins at ``offset`` of the (decompressed) file; read again to count, as it is rare."""
    with piece.file.open() as raw, decompressed(raw, piece.file.name) as handle:
        number, left = 1, offset
        while left > 0 and (data := handle.read(min(left, BLOCK_BYTES))):
            number += data.count(b"\n")
            left -= len(data)
    return f"{piece.file.place}:{number}"


def no_column(where: str, column: str, known: Iterable[str]) -> str:
    """What to say where a source has no such column."""
    return f"{where}: no column {column!r} (preprocess.text_column): {did_you_mean(column, known)}"


# --- Parquet ------------------------------------------------------------------------------------------


def import_pyarrow(place: str) -> Any:
    """pyarrow, told to give memory back when it is done with it. Raises BadInput where it is missing."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    return_large_blocks()
    try:
        import pyarrow
    except ImportError:
        raise BadInput(f'{place}: reading it needs pyarrow: pip install "amlaunch[preprocess]"') from None
    return pyarrow


def return_large_blocks() -> None:
    """Have the system's allocator map what is large (pages of many megabytes) on its own, and unmap it when it is freed.

    Left alone, glibc keeps more and more of it: up to 32 MB a block, and its heap grows around them. pyarrow's own pool
    (mimalloc) keeps as much, or takes a third more time to read.
    """
    import ctypes

    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def native(handle: IO[bytes]) -> Any:
    """A file as pyarrow reads it best: one on this machine without Python in between, nor a copy of what is read."""
    import pyarrow as arrow

    name = getattr(handle, "name", None)
    return arrow.OSFile(os.fsencode(name)) if isinstance(name, str) else arrow.PythonFile(handle, mode="r")


def read_parquet(piece: Slice, column: str, rows: int) -> Iterator[Record]:
    """The records of the row groups whose middle lies in the slice; one column is read."""
    arrow = import_pyarrow(piece.file.place)
    from pyarrow import parquet

    try:
        with (
            piece.file.open() as opened,
            native(opened) as handle,
            parquet.ParquetFile(handle, pre_buffer=False, buffer_size=BLOCK_BYTES) as file,
        ):
            check_column(piece, file.schema_arrow, column)
            for group in row_groups(file.metadata, piece):
                yield from read_row_group(file, group, column, rows, piece)
    except (arrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk's word, or the network's, not the decoder's
            raise
        yield Bad(DAMAGED, f"{piece.file.place}: damaged, or not a whole Parquet file ({error})")


def check_column(piece: Slice, schema: Any, column: str) -> None:
    """Raise BadInput where a Parquet file has no such column, or one that does not hold text."""
    if column not in schema.names:
        raise BadInput(no_column(piece.file.place, column, schema.names))
    found = schema.field(column).type
    value = getattr(found, "value_type", found) if str(found).startswith("dictionary") else found
    if str(value) not in ("string", "large_string", "string_view", "null"):
        raise BadInput(f"{piece.file.place}: column {column!r} holds {found}, not text")


def row_groups(metadata: Any, piece: Slice) -> Iterator[int]:
    """The row groups of a slice: those whose middle, in bytes of the file's data, lies in it."""
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    total, before = max(1, sum(sizes)), 0
    for group, size in enumerate(sizes):
        if min((2 * before + size) * piece.count // (2 * total), piece.count - 1) == piece.index:
            yield group
        before += size


def read_row_group(file: Any, group: int, column: str, rows: int, piece: Slice) -> Iterator[Record]:
    """The records of one row group, so many rows at a time that long texts do not fill the memory."""
    metadata = file.metadata.row_group(group)
    whole = file.metadata
    row = sum(whole.row_group(i).num_rows for i in range(group))
    names = [metadata.column(i).path_in_schema for i in range(metadata.num_columns)]
    average = metadata.column(names.index(column)).total_uncompressed_size // max(1, metadata.num_rows)
    few = max(1, min(rows, BLOCK_BYTES // max(1, average)))
    for batch in file.iter_batches(few, row_groups=[group], columns=[column], use_threads=False):
        records = text_records(batch.column(0), f"{piece.file.place}: row", row)
        row += len(batch)
        del batch  # the texts are there once, now
        yield from records


def text_records(values: Any, where: str, row: int) -> list[Record]:
    """The records of an array of text; one that is not UTF-8 is looked at row by row."""
    try:
        return [Skipped("null") if text is None else text for text in values.to_pylist()]
    except UnicodeDecodeError:
        import pyarrow as arrow

        raw = values.cast(arrow.large_binary()).to_pylist()
        return [_text_record(data, f"{where} {row + i}") for i, data in enumerate(raw)]


def _text_record(data: bytes | None, where: str) -> Record:
    if data is None:
        return Skipped("null")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return Bad("undecodable", f"{where}: byte {error.start} of the text is not utf-8 ({error.reason})")
