"""The shard format, byte by byte, and every way a file can be no shard."""

from __future__ import annotations

import itertools
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from amlaunch.preprocess.progress import Progress
from amlaunch.preprocess.shards import shard_format
from amlaunch.preprocess.shards.shard_format import (
    ShardHeader,
    open_tokens,
    read_ends,
    read_header,
    read_manifest,
    token_dtype,
    write_shard,
)
from amlaunch.preprocess.stages.element import BudgetTracker, run_element
from amlaunch.preprocess.stages.inspect_data import ShardSequence
from amlaunch.preprocess.stages.part_writer import length_histogram
from amlaunch.preprocess.stages.verify import verify
from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Preprocess


def put(path: Path, ints: list[int], body: bytes) -> Path:
    path.write_bytes(struct.pack("<256i", *ints, *[0] * (256 - len(ints))) + body)
    return path


def test_header_bytes_are_llm_c_s_with_size_and_documents_in_spare_ints(tmp_path: Path) -> None:
    path = tmp_path / "train-00000-00000.bin"
    assert write_shard(path, [np.array([50256, 1, 2]), np.array([50256])], token_dtype(50257)) == ShardHeader(4, 2, 2)
    raw = path.read_bytes()
    assert struct.unpack("<256i", raw[:1024]) == (20240520, 1, 4, 2, 2, *[0] * 251)
    assert raw[1024:] == struct.pack("<4H", 50256, 1, 2, 50256)
    assert path.with_suffix(".idx").read_bytes() == struct.pack("<2Q", 3, 4)


def test_large_vocabularies_take_four_bytes_and_nemo_s_magic(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    write_shard(path, [np.array([100257, 70000])], token_dtype(100277))
    raw = path.read_bytes()
    assert struct.unpack("<5i", raw[:20]) == (278895051, 1, 2, 4, 1)
    assert raw[1024:] == struct.pack("<2I", 100257, 70000)
    assert open_tokens(path).dtype == np.uint32


# --- other people's loaders, by what is known of how each reads ------------------------------------------


def as_llm_c_reads(path: Path) -> np.ndarray[Any, Any]:
    """Read as its C loader does: magic, version, and the file size from the count alone; nothing else of the header."""
    with open(path, "rb") as handle:
        header = struct.unpack("<256i", handle.read(1024))
        assert header[:2] == (20240520, 1)
        assert os.fstat(handle.fileno()).st_size == 256 * 4 + header[2] * 2
        tokens = np.frombuffer(handle.read(), dtype=np.uint16)  # its Python twin reads the rest of the file
    assert len(tokens) == header[2]
    return tokens


def as_modded_nanogpt_reads(path: Path) -> np.ndarray[Any, Any]:
    """torch maps the header; the tokens are read into memory allocated by the count. Documents are where BOS stands."""
    header = torch.from_file(str(path), False, 256, dtype=torch.int32)
    assert int(header[0]) == 20240520 and int(header[1]) == 1
    tokens = torch.empty(int(header[2]), dtype=torch.uint16)
    with open(path, "rb", buffering=0) as handle:
        handle.seek(256 * 4)
        assert handle.readinto(memoryview(tokens.numpy()).cast("B")) == 2 * int(header[2])
        assert handle.read() == b""
    return tokens.numpy()


def as_the_guide_s_loader_reads(path: Path) -> np.ndarray[Any, Any]:
    """A map of the file behind the header; the old magic means two bytes, the new one says how many."""
    header = np.memmap(path, dtype=np.int32, mode="r", shape=(256,))
    assert header[1] == 1 and header[0] in (278895051, 20240520)
    size = int(header[3]) if header[0] == 278895051 else 2
    dtype = {2: np.uint16, 4: np.uint32}[size]
    assert path.stat().st_size == 1024 + int(header[2]) * size
    return np.memmap(path, dtype=dtype, mode="r", offset=1024, shape=(int(header[2]),))


def made(folder: Path, **more: Any) -> list[int]:
    """Make shards of three documents, one with a literal special token, as the stages do; return the train tokens."""
    (folder / "x.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in ("held out", "naïve <|endoftext|> text", "東京"))
    )
    options = Preprocess(data_files=f"{folder}/x.jsonl", val_tokens=1, parts=1, **more)
    run_element(options, 0, folder / "out", Progress(log=lambda text: None), 0)
    verify(options, folder / "out", Progress(log=lambda text: None))
    tokenizer = load_tokenizer(more.get("tokenizer", "gpt2"))
    return [
        token
        for text in ("naïve <|endoftext|> text", "東京")
        for token in (tokenizer.bos, *tokenizer.encode(text).tolist())
    ]


@pytest.mark.parametrize("read", [as_llm_c_reads, as_modded_nanogpt_reads, as_the_guide_s_loader_reads])
def test_two_byte_shards_are_read_by_all_three_loaders(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    expected = made(tmp_path)
    (path,) = (tmp_path / "out").glob("train-*.bin")
    tokens_read = read(path)
    assert tokens_read.tolist() == expected
    assert np.flatnonzero(tokens_read == 50256).tolist() == [0, *read_ends(path)[:-1].tolist()], (
        "documents, for those who look for BOS"
    )


def test_four_byte_shards_are_read_by_the_guide_s_and_refused_by_the_others(tmp_path: Path) -> None:
    """llm.c's format has two bytes a token; a magic of its own keeps its readers from reading nonsense."""
    path = tmp_path / "x.bin"
    write_shard(path, [np.array([100257, 70000])], token_dtype(100277))
    assert as_the_guide_s_loader_reads(path).tolist() == [100257, 70000]
    for read in (as_llm_c_reads, as_modded_nanogpt_reads):
        with pytest.raises(AssertionError):
            read(path)


def test_raw_files_are_read_as_nanogpt_reads_them(tmp_path: Path) -> None:
    """A map of the whole file as uint16, windows at random offsets, labels one further."""
    expected = made(tmp_path, format="raw")
    data = np.memmap(tmp_path / "out" / "train.bin", dtype=np.uint16, mode="r")
    assert data.tolist() == expected
    for at in range(len(data) - 4):
        x, y = (torch.from_numpy(data[begin : begin + 4].astype(np.int64)) for begin in (at, at + 1))
        assert x[1:].tolist() == y[:-1].tolist() == expected[at + 1 : at + 4]
    assert np.memmap(tmp_path / "out" / "val.bin", dtype=np.uint16, mode="r")[0] == 50256


@pytest.mark.parametrize(("n_vocab", "size"), [(2**16 - 1, 2), (2**16, 2), (2**16 + 1, 4)])
def test_two_bytes_hold_exactly_65536_ids(n_vocab: int, size: int) -> None:
    assert token_dtype(n_vocab).itemsize == size


@given(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=30), min_size=1, max_size=20))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]]) -> None:
    path = tmp_path_factory.mktemp("shard") / "x.bin"
    write_shard(path, [np.array(text, dtype=np.uint16) for text in texts], np.dtype("<u2"))
    ends = read_ends(path).tolist()
    tokens = open_tokens(path)
    assert [tokens[a:b].tolist() for a, b in zip([0, *ends[:-1]], ends, strict=True)] == texts


@pytest.mark.parametrize(
    ("ints", "body", "header"),
    [
        ([20240520, 1, 3], bytes(6), ShardHeader(3, 2, None)),  # llm.c
        ([278895051, 1, 3, 2], bytes(6), ShardHeader(3, 2, None)),  # NeMo
        ([278895051, 1, 3, 4], bytes(12), ShardHeader(3, 4, None)),  # NeMo, large vocabulary
    ],
)
def test_others_layouts_are_read(tmp_path: Path, ints: list[int], body: bytes, header: ShardHeader) -> None:
    assert read_header(put(tmp_path / "x.bin", ints, body)) == header


@pytest.mark.parametrize(
    ("ints", "body", "message"),
    [
        ([20240520, 1, 3, 2], bytes(5), "truncated: expected 1030 bytes (3 tokens of 2 bytes), got 1029"),
        ([20240520, 1, 3, 2], bytes(8), "longer than its header says"),
        ([20240520, 1, 3, 4], bytes(6), "truncated"),
        ([20240520, 1, 0, 2], b"", "counts 0 tokens"),
        ([20240520, 1, -5, 2], b"", "counts -5 tokens"),
        ([20240520, 2, 3, 2], bytes(6), "expected shard format version 1, got 2"),
        ([20240520, 1, 3, 8], bytes(24), "expected 2 or 4 bytes per token in its header, got 8"),
        ([278895051, 1, 3, 0], bytes(6), "expected 2 or 4 bytes per token in its header, got 0"),
        (
            [1179403647, 1, 3, 2],
            bytes(6),
            "not a token shard: expected magic number 20240520 (llm.c) or 278895051 (NeMo), got 1179403647",
        ),
    ],
)
def test_refusals_name_the_file_and_what_is_wrong(tmp_path: Path, ints: list[int], body: bytes, message: str) -> None:
    path = put(tmp_path / "some.bin", ints, body)
    with pytest.raises(BadInput, match=r"some\.bin") as error:
        open_tokens(path)
    assert message in str(error.value)


def test_missing_empty_and_short_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"none\.bin: cannot be read \(No such file"):
        read_header(tmp_path / "none.bin")
    for size in (0, 1023):
        (tmp_path / "x.bin").write_bytes(bytes(size))
        with pytest.raises(BadInput, match=f"{size} bytes are too few"):
            read_header(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (struct.pack("<2Q", 3, 5), "does not belong"),
        (struct.pack("<1Q", 4), "does not belong"),  # the header counts two documents
        (struct.pack("<2Q", 4, 4), "does not belong"),
        (struct.pack("<2Q", 0, 4), "does not belong"),
        (b"", "does not belong"),
        (bytes(9), "truncated"),
    ],
)
def test_an_index_of_another_shard_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "x.bin"
    write_shard(path, [np.array([9, 1, 2]), np.array([9])], np.dtype("<u2"))
    path.with_suffix(".idx").write_bytes(raw)
    with pytest.raises(BadInput, match=message):
        read_ends(path)


def test_more_tokens_than_int32_counts_are_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_format, "MAX_TOKENS", 5)
    with pytest.raises(BadInput, match="at most 5 tokens"):
        write_shard(tmp_path / "x.bin", [np.arange(3), np.arange(3)], np.dtype("<u2"))
    assert list(tmp_path.iterdir()) == []


def test_manifest_refusals(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"manifest.json: no such file\. Run the preprocess and verify"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BadInput, match="not valid JSON"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"version": 99, "splits": {}}))
    with pytest.raises(BadInput, match="not a manifest of version 1"):
        read_manifest(tmp_path)


# --- past 2^31 and 2^32 -------------------------------------------------------------------------------


def sparse_shard(path: Path, tokens: int, ends: list[int], last: int) -> None:
    """A shard of so many tokens that takes next to no disk: zeros, but for the last one."""
    with open(path, "wb") as handle:
        handle.write(shard_format.header_bytes(ShardHeader(tokens, 2, len(ends))))
        handle.seek(1024 + 2 * tokens - 2)
        handle.write(struct.pack("<H", last))
    path.with_suffix(".idx").write_bytes(np.array(ends, dtype="<u8").tobytes())


def test_offsets_documents_and_budgets_past_2_to_the_32(tmp_path: Path) -> None:
    """Three shards as large as a header can say: 6.4 billion tokens, 12.9 GB."""
    size = 2**31 - 1
    paths = [tmp_path / f"train-{i:05d}-00000.bin" for i in range(3)]
    for i, path in enumerate(paths):
        sparse_shard(path, size, [10, size - 5, size], 7 + i)
    assert read_header(paths[0]) == ShardHeader(size, 2, 3)
    assert read_ends(paths[0]).tolist() == [10, size - 5, size]
    stream = ShardSequence(paths, [size] * 3)
    assert stream.read(size - 1, 2) == (paths[0], [7, 0])
    assert stream.read(2 * size - 1, 1) == (paths[1], [8]) and 2 * size - 1 > 2**32 - 4
    assert stream.read(3 * size - 1, 5) == (paths[2], [9])
    assert stream.locate_document(8, [3, 3, 3]) == (3 * size - 5, 5)
    assert stream.locate_document(7, [3, 3, 3]) == (2 * size + 10, size - 15)
    for token in (-1, 3 * size):
        with pytest.raises(BadInput, match=f"must be 0 to {3 * size - 1:,}"):
            stream.read(token, 1)


@given(st.lists(st.integers(0, 2**34), min_size=1, max_size=30), st.integers(1, 2**38))
def test_a_board_counts_to_the_token_whatever_the_size(counts: list[int], budget: int) -> None:
    """Parts finished in any order, from the back: what is left for each is the budget less what is known before it."""
    source = SimpleNamespace(sizes=[4 * count for count in counts])
    tracker = BudgetTracker(SimpleNamespace(source=source), budget)
    for part in reversed(range(len(counts))):
        tracker.tokens[part] = counts[part]
        tracker.complete.add(part)
    for part in range(len(counts)):
        left = budget - sum(counts[:part])
        assert tracker.tokens_left(part) == left
        assert tracker.is_needed(part) <= (left > 0) and (
            tracker.is_needed(part) or sum(counts[:part]) >= 1.02 * budget or left <= 0
        )


@given(
    st.lists(st.integers(10**7, 2**34), min_size=1, max_size=30),
    st.integers(1, 2**38),
    st.integers(1, 4),
    st.integers(0, 2**30),
)
def test_what_elements_expect_of_a_budget_sums_to_it(counts: list[int], budget: int, elements: int, known: int) -> None:
    """Before anything is known, with some parts counted (any of them), and with all."""
    source = SimpleNamespace(sizes=[4 * count for count in counts])
    tracker = BudgetTracker(SimpleNamespace(source=source), budget)
    shares = [range(element, len(counts), elements) for element in range(elements)]
    assert abs(sum(tracker.expected_tokens(share) or 0 for share in shares) - budget) <= elements, "shares by size"
    for part in [part for part in range(len(counts)) if known >> part & 1]:
        tracker.tokens[part] = counts[part]
        tracker.complete.add(part)
    if tracker.complete:
        expected = [tracker.expected_tokens(share) or 0 for share in shares]
        ends = [
            min(budget, end) for end in itertools.accumulate(counts, initial=0)
        ]  # the counts are a fourth of the bytes
        exact = [sum(ends[part + 1] - ends[part] for part in share) for share in shares]
        assert all(abs(a - b) <= 1e-6 * budget + 40 for a, b in zip(expected, exact, strict=True))


def test_a_histogram_of_lengths_is_exact_at_powers_of_two(tmp_path: Path) -> None:
    lengths = [1, 2, 3, 4, 7, 8, 2**20 - 1, 2**20]
    write_shard(tmp_path / "x.bin", [np.zeros(length, dtype=np.uint16) for length in lengths], np.dtype("<u2"))
    histogram = length_histogram(tmp_path / "x.bin")
    assert {power: count for power, count in enumerate(histogram) if count} == {0: 1, 1: 2, 2: 2, 3: 1, 19: 1, 20: 1}
