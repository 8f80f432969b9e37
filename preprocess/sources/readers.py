"""Readers of text, JSON lines and Parquet: they read by column and block, not through Python objects per row."""

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

from amlaunch.preprocess.sources.file_parts import FileSlice, file_format
from amlaunch.preprocess.sources.records import DamagedRecord, Record, SkippedRecord
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Preprocess
from amlaunch.recipes.suggestions import did_you_mean

PYTHON = "python"
"""The encoding that a Python source file declares (PEP 263)."""
BLOCK_BYTES = 1 << 20
"""Text column data decoded at once, approximately."""
LINE_BLOCK_BYTES = 1 << 17
"""JSON lines read at once: they fit into a core's cache and leave room for the vocabulary."""
LONG_LINE_BYTES = 1 << 22
"""From this size on, memory matters more than a parser's speed: orjson copies what it parses."""
DAMAGED_FILE = "damaged file"
MALLOPT_MMAP_THRESHOLD = -3
"""``M_MMAP_THRESHOLD`` of glibc's ``mallopt``."""
MMAP_THRESHOLD_BYTES = 4 << 20
"""Allocations from this size on are mapped individually."""


class UndecodableText(ValueError):
    """Bytes that are not text in the encoding; the message names the byte."""


def check_encoding(name: str) -> None:
    """Raise BadInput unless ``name`` is ``python`` or one of Python's text encodings."""
    if name == PYTHON:
        return
    try:
        # Unlike codecs.lookup, this rejects codecs that are not for text.
        "x".encode(name)
    except (LookupError, ValueError):
        from encodings.aliases import aliases

        known = [PYTHON, *aliases, *(alias.replace("_", "-") for alias in aliases.values())]
        raise BadInput(f"preprocess.encoding: unknown text encoding {name!r}; {did_you_mean(name, known)}") from None


def decode_text(data: bytes, encoding: str, errors: str) -> str:
    """Decode ``data``, leaving newlines as they are. Raises UndecodableText unless ``errors`` is ``replace``."""
    lenient = errors == "replace"
    try:
        codec = declared_encoding(data, lenient) if encoding == PYTHON else encoding
        return data.decode(codec, "replace" if lenient else "strict")
    except UnicodeDecodeError as error:
        raise UndecodableText(f"byte {error.start} is not valid {error.encoding} ({error.reason})") from None
    except (LookupError, UnicodeError) as error:
        # A coding line may name a codec that is not for text, or idna.
        raise UndecodableText(str(error)) from None


def declared_encoding(data: bytes, lenient: bool) -> str:
    """Return the encoding that a Python source file declares in its first two lines; UTF-8 if it declares none.

    Raises UndecodableText for an invalid declaration; returns UTF-8 instead if ``lenient``.
    """
    try:
        return tokenize.detect_encoding(io.BytesIO(data).readline)[0]
    except SyntaxError as error:
        if lenient:
            return "utf-8"
        # If the file is not UTF-8, this raises an error that names the byte.
        data.decode("utf-8")
        raise UndecodableText(str(error)) from None


def read_slice(file_slice: FileSlice, options: Preprocess) -> Iterator[Record]:
    """Return an iterator over the records of a slice.

    It raises BadInput if the file has no such column, and OSError if the file cannot be read.
    """
    format_ = file_format(file_slice.file.name)
    if format_ == "parquet":
        return read_parquet(file_slice, options.text_column, options.chunk_size)
    if format_ == "jsonl":
        return read_json_lines(file_slice, options.text_column)
    return read_text(file_slice, options.encoding, options.encoding_errors)


def read_text(file_slice: FileSlice, encoding: str, errors: str) -> Iterator[Record]:
    """Yield the only record of a text file."""
    try:
        with file_slice.file.open() as handle:
            yield decode_text(handle.read(), encoding, errors)
    except UndecodableText as error:
        if errors == "skip":
            yield SkippedRecord("undecodable")
            return
        yield DamagedRecord(
            "undecodable",
            f"{file_slice.file.location}: {error}. Set preprocess.encoding to the file's encoding (python: read its "
            f"coding line), set preprocess.encoding_errors to skip or replace, or exclude the file",
        )


# --- JSON lines ---------------------------------------------------------------------------------------


def read_json_lines(file_slice: FileSlice, column: str) -> Iterator[Record]:
    """Yield the records of the lines that begin in the slice, one block of lines at a time."""
    name, location = file_slice.file.name, file_slice.file.location
    try:
        with file_slice.file.open() as raw, decompress(raw, name) as handle:
            for offset, lines in line_blocks(handle, file_slice):
                yield from parse_lines(file_slice, offset, lines, column)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        yield DamagedRecord(DAMAGED_FILE, f"{location}: damaged or truncated gzip ({error})")
    except OSError as error:
        # pyarrow reports damaged zstd data as an OSError without errno.
        if error.errno or not name.endswith(".zst"):
            raise
        yield DamagedRecord(DAMAGED_FILE, f"{location}: damaged or truncated zstd ({error})")


def decompress(raw: IO[bytes], name: str) -> IO[bytes]:
    """Return the decompressed contents of a file that may be compressed, as its name says."""
    if name.endswith(".gz"):
        return gzip.open(raw, "rb")  # type: ignore[return-value]
    if name.endswith(".zst"):
        arrow = import_pyarrow(name)
        return arrow.CompressedInputStream(arrow.PythonFile(raw, mode="r"), "zstd")
    return raw


def line_blocks(handle: IO[bytes], file_slice: FileSlice) -> Iterator[tuple[int, list[bytearray]]]:
    """Yield blocks of complete lines with their offset in the file; only lines that begin in the slice."""
    begin, end = (file_slice.begin, file_slice.end) if file_slice.count > 1 else (0, None)
    if begin:
        # A line that began earlier belongs to the previous slice.
        handle.seek(begin - 1)
        begin += len(handle.readline()) - 1

    buffer = bytearray()
    while end is None or begin < end:
        data = handle.read(LINE_BLOCK_BYTES)
        searched = len(buffer)
        buffer += data

        if not data:
            cut = len(buffer)
        elif end is not None and begin + len(buffer) >= end:
            cut = buffer.find(b"\n", max(end - 1 - begin, 0)) + 1
        else:
            cut = buffer.rfind(b"\n", searched) + 1

        if cut:
            # Separate the rest before the lines are split, so that only one copy of a line of 50 MB is in memory.
            rest = buffer[cut:]
            del buffer[cut:]
            lines = buffer.split(b"\n")
            buffer = rest
            yield begin, lines
            begin += cut
        if not data:
            return


def parse_lines(file_slice: FileSlice, offset: int, lines: list[bytearray], column: str) -> Iterator[Record]:
    """Yield the records of lines, the first of which begins at ``offset``; skip blank lines. Empties ``lines``."""
    fast_loads = json_parser()
    lines.reverse()
    while lines:
        line: Any = lines.pop()
        begin, offset = offset, offset + len(line) + 1
        loads = fast_loads
        if len(line) > LONG_LINE_BYTES:
            line, loads = decode_long_line(line), json.loads
        try:
            text = loads(line)[column]
        except (ValueError, TypeError, LookupError, RecursionError):
            text = None
        if type(text) is str:
            # While a text of 50 MB is tokenised, only one copy of it is in memory.
            del line
            yield text
        elif not is_blank(line):
            yield parse_line(file_slice, begin, line, column)


def decode_long_line(line: bytearray) -> bytearray | str:
    """Decode a long line as the standard library would, so that its bytes can be freed before it is parsed.

    Returns the bytes if they cannot be decoded.
    """
    try:
        return line.decode(json.detect_encoding(line), "surrogatepass")
    except UnicodeDecodeError:
        return line


def is_blank(line: bytearray | str) -> bool:
    """Return True if a line holds nothing but ASCII white space."""
    return not line or (line.isspace() and (isinstance(line, bytearray) or line.isascii()))


def json_parser() -> Callable[[bytearray | str], Any]:
    """Return orjson's parser if it is installed (the extra ``fast``), else the standard library's.

    orjson accepts less JSON than the standard library, and gives the same for what it accepts; if it rejects a line,
    :func:`parse_line` decides. So the records do not depend on it.
    """
    try:
        import orjson
    except ImportError:
        return json.loads
    return orjson.loads


def parse_line(file_slice: FileSlice, offset: int, line: bytes | bytearray | str, column: str) -> Record:
    """Return the record of one line with the standard library's parser, and a precise message if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return DamagedRecord("not JSON", f"{line_location(file_slice, offset)}: not valid JSON ({error})")
    if not isinstance(row, dict):
        location = line_location(file_slice, offset)
        return DamagedRecord("not JSON", f"{location}: expected a JSON object on each line, got {type(row).__name__}")
    if column not in row:
        return DamagedRecord("no column", missing_column_message(line_location(file_slice, offset), column, row))
    value = row[column]
    if value is None:
        return SkippedRecord("null")
    if not isinstance(value, str):
        location = line_location(file_slice, offset)
        return DamagedRecord("not text", f"{location}: column {column!r} holds {type(value).__name__}, not text")
    return value


def line_location(file_slice: FileSlice, offset: int) -> str:
    """Return ``file:line`` of the line at ``offset`` of the (decompressed) file.

    Counts lines from the start of the file, which is acceptable because it is rare.
    """
    with file_slice.file.open() as raw, decompress(raw, file_slice.file.name) as handle:
        number, remaining = 1, offset
        while remaining > 0 and (data := handle.read(min(remaining, BLOCK_BYTES))):
            number += data.count(b"\n")
            remaining -= len(data)
    return f"{file_slice.file.location}:{number}"


def missing_column_message(location: str, column: str, known: Iterable[str]) -> str:
    """Return the message for a source that has no such column."""
    return f"{location}: no column {column!r} (preprocess.text_column); {did_you_mean(column, known)}"


# --- Parquet ------------------------------------------------------------------------------------------


def import_pyarrow(location: str) -> Any:
    """Import pyarrow, configured to return freed memory. Raises BadInput if it is not installed."""
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    unmap_freed_blocks()
    try:
        import pyarrow
    except ImportError:
        raise BadInput(f'{location}: reading it needs pyarrow: pip install "amlaunch[preprocess]"') from None
    return pyarrow


def unmap_freed_blocks() -> None:
    """Make the system's allocator map large blocks (pages of many megabytes) individually, and unmap them when freed.

    By default glibc raises its threshold up to 32 MB a block, and the heap around such blocks grows. pyarrow's own pool
    (mimalloc) keeps as much memory, or takes a third longer to read.
    """
    import ctypes

    # Other C libraries have no mallopt.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(MALLOPT_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)


def open_arrow_file(handle: IO[bytes]) -> Any:
    """Open a file for pyarrow: a local one natively, without Python in between and without a copy of what is read."""
    import pyarrow as arrow

    name = getattr(handle, "name", None)
    return arrow.OSFile(os.fsencode(name)) if isinstance(name, str) else arrow.PythonFile(handle, mode="r")


def read_parquet(file_slice: FileSlice, column: str, rows: int) -> Iterator[Record]:
    """Yield the records of the row groups whose middle lies in the slice; reads one column."""
    arrow = import_pyarrow(file_slice.file.location)
    from pyarrow import parquet

    try:
        with (
            file_slice.file.open() as raw,
            open_arrow_file(raw) as handle,
            parquet.ParquetFile(handle, pre_buffer=False, buffer_size=BLOCK_BYTES) as file,
        ):
            check_column(file_slice, file.schema_arrow, column)
            for group in row_groups(file.metadata, file_slice):
                yield from read_row_group(file, group, column, rows, file_slice)
    except (arrow.ArrowException, OSError) as error:
        # An errno means that the disk or the network failed, not the decoder.
        if getattr(error, "errno", None):
            raise
        yield DamagedRecord(DAMAGED_FILE, f"{file_slice.file.location}: damaged or truncated Parquet file ({error})")


def check_column(file_slice: FileSlice, schema: Any, column: str) -> None:
    """Raise BadInput if a Parquet file has no such column, or one that does not hold text."""
    location = file_slice.file.location
    if column not in schema.names:
        raise BadInput(missing_column_message(location, column, schema.names))
    column_type = schema.field(column).type
    is_dictionary = str(column_type).startswith("dictionary")
    value_type = getattr(column_type, "value_type", column_type) if is_dictionary else column_type
    if str(value_type) not in ("string", "large_string", "string_view", "null"):
        raise BadInput(f"{location}: column {column!r} holds {column_type}, not text")


def row_groups(metadata: Any, file_slice: FileSlice) -> Iterator[int]:
    """Yield the row groups whose middle, in bytes of the file's data, lies in the slice."""
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    total, before = max(1, sum(sizes)), 0
    for group, size in enumerate(sizes):
        slice_index = (2 * before + size) * file_slice.count // (2 * total)
        if min(slice_index, file_slice.count - 1) == file_slice.index:
            yield group
        before += size


def read_row_group(file: Any, group: int, column: str, rows: int, file_slice: FileSlice) -> Iterator[Record]:
    """Yield the records of one row group, decoding at most ``rows`` rows at a time, fewer if the texts are long."""
    row = sum(file.metadata.row_group(i).num_rows for i in range(group))
    metadata = file.metadata.row_group(group)
    names = [metadata.column(i).path_in_schema for i in range(metadata.num_columns)]
    row_bytes = metadata.column(names.index(column)).total_uncompressed_size // max(1, metadata.num_rows)
    batch_rows = max(1, min(rows, BLOCK_BYTES // max(1, row_bytes)))

    for batch in file.iter_batches(batch_rows, row_groups=[group], columns=[column], use_threads=False):
        records = parse_column(batch.column(0), f"{file_slice.file.location}: row", row)
        row += len(batch)
        # From here on only one copy of the texts is in memory.
        del batch
        yield from records


def parse_column(values: Any, location: str, row: int) -> list[Record]:
    """Return the records of an array of text; if it is not all UTF-8, decode it row by row."""
    try:
        return [SkippedRecord("null") if text is None else text for text in values.to_pylist()]
    except UnicodeDecodeError:
        import pyarrow as arrow

        raw = values.cast(arrow.large_binary()).to_pylist()
        return [_decode_row(data, f"{location} {row + i}") for i, data in enumerate(raw)]


def _decode_row(data: bytes | None, location: str) -> Record:
    if data is None:
        return SkippedRecord("null")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return DamagedRecord(
            "undecodable", f"{location}: byte {error.start} of the text is not valid utf-8 ({error.reason})"
        )
