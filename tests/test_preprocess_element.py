"""Elements and verify, in this process: exactly-once, budgets, splits, restarts, damage."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amlaunch.preprocess.progress import Progress, StopRequested
from amlaunch.preprocess.shards.output_folder import START_CURSOR, Cursor, OutputDir
from amlaunch.preprocess.shards.shard_format import read_header, read_manifest
from amlaunch.preprocess.sources.records import DamagedRecord, Record, SkippedRecord
from amlaunch.preprocess.stages.element import element_result, run_element
from amlaunch.preprocess.stages.part_writer import DocumentStream, PartLimits, ShardCounts, shard_documents
from amlaunch.preprocess.stages.verify import IncompleteOutput, verify
from amlaunch.preprocess.tokenizers.engine import Engine
from amlaunch.preprocess.tokenizers.tokenizer import load_tokenizer
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Preprocess
from amlaunch.recipes.format.targets import TargetPolicy
from amlaunch.recipes.run_layout import ElementDir
from tests.preprocess_helpers import corpus, cut, documents, everything, make, parts_of

TOKENIZER = load_tokenizer("gpt2")
QUIET = Progress(log=lambda text: None)


@pytest.fixture(autouse=True)
def _one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building it takes 0.1 s, and a name always means the same one."""
    monkeypatch.setattr("amlaunch.preprocess.stages.element.load_tokenizer", functools.cache(load_tokenizer))


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    return corpus(tmp_path / "corpus")


def recipe(tmp_path: Path, **more: Any) -> Preprocess:
    options = {
        "data_files": f"{tmp_path}/corpus/**/*.txt",
        "shard_tokens": 700,
        "parts": 1,
        "engine": "tiktoken",
        **more,
    }
    return Preprocess(**options)


def encoded(text: str) -> tuple[int, ...]:
    return (50256, *TOKENIZER.encoding.encode_ordinary(text))


# --- every document once ------------------------------------------------------------------------------


def stream(out: Path) -> list[tuple[int, ...]]:
    return list(map(tuple, documents(out)))


@pytest.mark.parametrize(
    ("parts", "elements", "workers"),
    [
        (7, 1, 0),
        (7, 1, 2),
        (7, 1, 5),
        (7, 2, 0),
        (7, 7, 0),
        (1, 1, 2),
        (40, 3, 2),
        pytest.param(40, 1, 32, marks=pytest.mark.slow),
        (40, 40, 0),
    ],
)
@pytest.mark.slow
def test_any_number_of_parts_elements_and_workers_gives_the_same_stream(
    tmp_path: Path, texts: list[str], parts: int, elements: int, workers: int
) -> None:
    """And with the same parts, the same bytes."""
    options = recipe(tmp_path, parts=parts, elements=elements, val_tokens=0)
    made = make(options, tmp_path / "out", workers=workers)
    make(recipe(tmp_path), tmp_path / "one")
    assert stream(tmp_path / "out") == stream(tmp_path / "one")
    assert sorted(stream(tmp_path / "out")) == sorted(encoded(text) for text in texts if text)
    assert sum(part.cursor.skipped.get("empty", 0) for part in made) == 1
    assert sum(part.cursor.records for part in made) == len(texts)
    make(recipe(tmp_path, parts=parts), tmp_path / "alone")
    assert shards(tmp_path / "out") == shards(tmp_path / "alone")


def shards(out: Path) -> dict[str, bytes]:
    """What must not depend on who made it: shards, entries, parts, the manifest."""
    return {name: raw for name, raw in everything(out).items() if not name.startswith(("origin", "element"))}


@pytest.mark.slow
@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.text(max_size=40), min_size=1, max_size=12),
    st.integers(1, 3),
    st.sampled_from(["auto", "tiktoken"]),
    st.booleans(),
)
def test_any_text_of_unicode_goes_through_whole_in_either_format(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], elements: int, engine: str, ascii_: bool
) -> None:
    """From JSON lines and from Parquet: tiktoken's tokens per document, their index entries, and the text back."""
    folder = tmp_path_factory.mktemp("unicode")
    texts = ["first", *texts, "last", "one more"]  # three parts have something each
    (folder / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": text}, ensure_ascii=ascii_) for text in texts), newline=""
    )
    pq.write_table(pa.table({"text": texts}), folder / "a.parquet", row_group_size=1)
    expected = [text for text in texts if text]
    for name in ("a.jsonl", "a.parquet"):
        options = Preprocess(data_files=f"{folder}/{name}", parts=3, elements=elements, engine=engine, shard_tokens=40)
        make(options, folder / name.replace(".", "-"))
        found = documents(folder / name.replace(".", "-"))
        assert list(map(tuple, found)) == [encoded(text) for text in expected]
        assert [TOKENIZER.decode(document[1:]) for document in found] == expected


class Listed:
    """A source of given records."""

    def __init__(self, records: list[Record]):
        self.all = records

    def identity(self) -> dict[str, Any]:
        return {}

    def records(self, skip: int) -> Any:
        return iter(self.all[skip:])

    def documents(self) -> DocumentStream:
        return DocumentStream(self.records, Engine(TOKENIZER), skip_damaged=True)


def next_pieces(stream: DocumentStream, cursor: Cursor, limits: PartLimits) -> tuple[list[list[int]], Cursor]:
    """The documents of the shard at a cursor, and the cursor behind them."""
    written = ShardCounts(cursor, limits.split_at(cursor))
    pieces = []
    for document in shard_documents(stream, cursor, limits):
        written.add(document)
        pieces.append(document.tokens.tolist())
    return pieces, written.cursor


record = st.one_of(
    st.text("abc ü\n", max_size=60), st.just(SkippedRecord("null")), st.just(DamagedRecord("not text", "row 7"))
)


@settings(deadline=None)
@given(
    st.lists(record, max_size=15),
    st.integers(1, 60),
    st.integers(0, 40),
    st.one_of(st.none(), st.integers(41, 200)),
)
def test_shards_cut_a_stream_of_any_documents(records: list[Record], shard: int, val: int, total: int | None) -> None:
    """All rules of the cut at once; a fresh stream, as after a kill, and the running one give the same shards."""
    limits = PartLimits(total, val, shard)
    running = Listed(records).documents()
    cursor, splits, joined = START_CURSOR, [], []
    while limits.tokens_left(cursor) != 0:
        running.seek(cursor)
        pieces, cursor_after = next_pieces(running, cursor, limits)
        fresh = Listed(records).documents()
        fresh.seek(cursor)
        assert next_pieces(fresh, cursor, limits) == (pieces, cursor_after)
        if not pieces:
            break
        if limits.tokens_left(cursor_after) != 0:
            assert sum(len(tokens) for tokens in pieces) <= shard or len(pieces) == 1
        splits.append(limits.split_at(cursor))
        joined += pieces
        cursor = cursor_after
    expected = [token for text in records if isinstance(text, str) and text for token in encoded(text)]
    assert list(chain.from_iterable(joined)) == expected[:total]
    assert splits == sorted(splits, reverse=True), "val first, then train"
    assert cursor.tokens == min(len(expected), total or len(expected))
    lengths, val_documents = [len(tokens) for tokens in joined], 0
    while val_documents < len(lengths) and sum(lengths[:val_documents]) < val:
        val_documents += 1
    assert cursor.val == sum(lengths[:val_documents])


def test_a_shard_ends_before_the_document_that_would_not_fit_and_a_giant_has_its_own(tmp_path: Path) -> None:
    lengths = [300, 300, 300, 1500, 10, 690, 1]
    (tmp_path / "c").mkdir()
    lines = [json.dumps({"text": " a" * (n - 1)}) for n in lengths]  # BOS is one of the n
    (tmp_path / "c" / "x.jsonl").write_text("\n".join(lines))
    make(Preprocess(data_files=f"{tmp_path}/c/*", shard_tokens=700, parts=1), tmp_path / "out")
    sizes = [read_header(path).tokens for path in sorted((tmp_path / "out").glob("*.bin"))]
    assert sizes == [600, 300, 1500, 700]


# --- budgets and splits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "elements", "workers", "order"),
    [
        (1000, 1, 0, 1),
        (1001, 1, 3, 1),
        (1500, 4, 0, 1),
        (1500, 4, 0, -1),
        (1, 3, 0, 1),
        (2300, 2, 2, -1),
        (10**9, 3, 0, 1),
    ],
)
def test_the_budget_is_the_first_tokens_of_the_source_whoever_makes_them_in_any_order(
    tmp_path: Path, texts: list[str], budget: int, elements: int, workers: int, order: int
) -> None:
    options = recipe(tmp_path, max_tokens=budget, elements=elements, parts=20, val_tokens=300 if budget > 999 else 0)
    for index in list(range(elements))[::order]:
        make(options, tmp_path / "out", range(index, index + 1), workers=workers)
    manifest = verify(options, tmp_path / "out", QUIET)
    make(recipe(tmp_path), tmp_path / "all")
    all_tokens = [token for document in stream(tmp_path / "all") for token in document]
    assert [token for document in stream(tmp_path / "out") for token in document] == all_tokens[:budget]
    assert manifest["tokens"] == min(budget, len(all_tokens))
    alone = dataclasses.replace(options, elements=1)
    make(alone, tmp_path / "alone")
    verify(alone, tmp_path / "alone", QUIET)
    assert shards(tmp_path / "out") == shards(tmp_path / "alone")
    before = shards(tmp_path / "out")
    make(options, tmp_path / "out")
    assert verify(options, tmp_path / "out", QUIET) == manifest and shards(tmp_path / "out") == before


class RecordingProgress(Progress):
    """Notes each (done, total)."""

    def __init__(self) -> None:
        super().__init__(log=lambda text: None)
        self.steps: list[tuple[int, int | None]] = []

    def update(self, done: int, total: int | None, fraction: float | None = None, **more: Any) -> None:
        """Also what comes too fast to be shown."""
        self.steps.append((done, total))
        super().update(done, total, fraction, **more)


@pytest.mark.parametrize(("budget", "elements"), [(1500, 1), (1500, 3), (10**7, 2)])
def test_each_element_says_how_much_of_the_budget_is_its_own(
    tmp_path: Path, texts: list[str], budget: int, elements: int
) -> None:
    options = recipe(tmp_path, max_tokens=budget, elements=elements, parts=20)
    made = []
    for index in range(elements):
        progress = RecordingProgress()
        made.append(sum(part.cursor.tokens for part in run_element(options, index, tmp_path / "out", progress, 0)))
        assert progress.steps and all(
            total is not None and done <= total <= max(budget, done) for done, total in progress.steps
        )
        last = progress.steps[-1][1]
        assert last is not None and made[-1] <= last <= 1.6 * made[-1], "once parts are counted: what there is"
    assert budget <= sum(made) or budget == 10**7


def test_elements_that_stop_too_early_are_made_up_for(tmp_path: Path) -> None:
    """The front has many tokens a byte, so the estimate says that the rest is not needed; it is."""
    (tmp_path / "corpus").mkdir()
    lines = ["🎉" * 450] * 3 + ["a" * 1800] * 30
    (tmp_path / "corpus" / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines)
    )
    options = recipe(tmp_path, data_files=f"{tmp_path}/corpus/*", max_tokens=15_000, elements=5, parts=10)
    log_lines: list[str] = []
    make(options, tmp_path / "out")
    manifest = verify(options, tmp_path / "out", Progress(log=log_lines.append))
    assert manifest["tokens"] == 15_000 and any("needed for the budget after all" in line for line in log_lines)


def test_a_budget_reads_no_further_than_it_needs(tmp_path: Path) -> None:
    lines = '{"text": "a b c d e f"}\n' + "broken\n"
    (tmp_path / "x.jsonl").write_text(lines)
    make(Preprocess(data_files=f"{tmp_path}/x.jsonl", max_tokens=5), tmp_path / "out")
    assert documents(tmp_path / "out") == [[50256, 64, 275, 269, 288]]


def test_a_source_that_ends_before_the_budget_is_said(tmp_path: Path, texts: list[str]) -> None:
    lines: list[str] = []
    options = recipe(tmp_path, max_tokens=10**9)
    (part,) = make(options, tmp_path / "out")
    verify(options, tmp_path / "out", Progress(log=lines.append))
    assert any(f"the source has only {part.cursor.tokens:,} of max_tokens 1,000,000,000" in line for line in lines)


@pytest.mark.parametrize("parts", [1, 5])
def test_validation_is_the_first_whole_documents_of_the_front_and_disjoint(
    tmp_path: Path, texts: list[str], parts: int
) -> None:
    options = recipe(tmp_path, val_tokens=900, parts=parts)
    make(dataclasses.replace(options, val_tokens=0), tmp_path / "plain")
    made = make(options, tmp_path / "out")
    plain = {entry.file.split("-")[1]: [] for part in made for entry in part.shards}
    for part in parts_of(tmp_path / "plain"):
        plain[f"{part.number:05d}"] = [d for entry in part.shards for d in cut(tmp_path / "plain" / entry.file)]
    for number, all_documents in plain.items():
        val, train = (
            [d for path in sorted((tmp_path / "out").glob(f"{split}-{number}-*.bin")) for d in cut(path)]
            for split in ("val", "train")
        )
        assert val + train == all_documents
    val = documents(tmp_path / "out", "val")
    assert sum(map(len, val)) >= 900 and sum(map(len, val[:-1])) < 900 + (parts - 1) * 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 500, "val_tokens": 500}, "leaves nothing to train on"),
        ({"max_tokens": 0}, "nothing to train on"),
        ({"elements": 4, "parts": 3}, "at most 3"),
        ({"parts": 99}, "at most 4 parts"),
        ({"engine": "gigatoken", "tokenizer": "byte"}, "gigatoken supports only gpt2"),
        ({"shard_tokens": 2**31}, "1 to 2,147,483,647"),
        ({"shard_tokens": 0}, "1 to 2,147,483,647"),
        ({"tokenizer": "gpt-2"}, "did you mean 'gpt2'"),
        ({"tokenizer": "./nowhere"}, "nowhere/tokenizer.json: cannot be read"),
        ({"tokenizer": "char:/dev/null"}, "the file is empty"),
    ],
)
def test_recipes_that_cannot_work_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / "corpus").mkdir()
    for i in range(4):
        (tmp_path / "corpus" / f"{i}.txt").write_text("word " * 300)
    with pytest.raises(BadInput, match=message):
        make(recipe(tmp_path, **change), tmp_path / "out")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "file is a file, not a folder"),
        ("file/below", "file is a file"),
        ("locked/new", "locked is not writable \\(owner: "),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o500)
    if os.geteuid() == 0:  # for whom nothing is locked
        monkeypatch.setattr("os.access", lambda path, mode: bool(Path(path).stat().st_mode & 0o200))
    with pytest.raises(BadInput, match=f"preprocess.output_dir: .*{message}"):
        make(recipe(tmp_path), tmp_path / place)
    assert not list((tmp_path / "locked").iterdir())


def test_what_a_killed_element_began_beyond_the_budget_goes(tmp_path: Path, texts: list[str]) -> None:
    options, out = recipe(tmp_path, max_tokens=900, parts=20), tmp_path / "out"
    make(options, out)
    before = everything(out)
    for name in ("train-00019-00000.bin", "train-00019-00000.idx", ".train-00018-00000.bin.host.7.tmp"):
        (out / name).write_bytes(b"half")
    verify(options, out, QUIET)
    (out / "manifest.json").unlink()
    assert everything(out) == before


# --- documents and engines ----------------------------------------------------------------------------


ODD = ["<|endoftext|>", "a\ud800b", "\x00", "", "x" * 3000, " " * 3000, "\ufeffé\U0001f389\r\n", "word " * 400_000]


def test_every_odd_document_has_its_outcome_and_is_counted(tmp_path: Path) -> None:
    rows = [*({"text": text} for text in ODD), {"text": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = Preprocess(data_files=f"{tmp_path}/a.jsonl", engine="tiktoken", parts=3)
    make(options, tmp_path / "out")
    manifest = verify(options, tmp_path / "out", QUIET)
    assert list(map(list, stream(tmp_path / "out"))) == [list(encoded(text)) for text in ODD if text]
    assert (manifest["documents"], manifest["skipped"], manifest["repaired"]) == (7, {"empty": 1, "null": 1}, 1)
    assert manifest["text_bytes"] == sum(len(text.encode("utf-8", "surrogatepass")) for text in ODD)
    lengths = [len(encoded(text)) for text in ODD if text]
    assert manifest["histogram"] == [
        sum(length.bit_length() == bits for length in lengths) for bits in range(1, max(lengths).bit_length() + 1)
    ]


def test_a_damaged_record_fails_with_its_name_or_is_left_out_counted_and_listed(tmp_path: Path) -> None:
    lines = ['{"text": "a"}', "{", '{"text": 3}', '{"txt": "b"}', '{"text": "c"}', "[]"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    options = Preprocess(data_files=f"{tmp_path}/a.jsonl")
    for workers in (0, 2):
        with pytest.raises(BadInput, match=r"a\.jsonl:2: not valid JSON.*on_error: skip"):
            make(options, tmp_path / "out", workers=workers)
    options = dataclasses.replace(options, on_error="skip")
    make(options, tmp_path / "skip")
    manifest = verify(options, tmp_path / "skip", QUIET)
    assert manifest["skipped"] == {"not JSON": 2, "not text": 1, "no column": 1} and manifest["documents"] == 2
    assert [error.split(":")[1] for error in manifest["errors"]] == ["2", "3", "4", "6"]


def test_one_corrupt_parquet_file_among_many(tmp_path: Path) -> None:
    for i in range(6):
        pq.write_table(pa.table({"text": [f"{i} {j} {'x' * 50}" for j in range(40)]}), tmp_path / f"{i}.parquet")
    raw = bytearray((tmp_path / "3.parquet").read_bytes())
    raw[20:60] = bytes(40)
    (tmp_path / "3.parquet").write_bytes(raw)
    options = Preprocess(data_files=f"{tmp_path}/*.parquet", parts=6)
    with pytest.raises(BadInput, match=r"3\.parquet: damaged"):
        make(options, tmp_path / "out", workers=2)
    options = dataclasses.replace(options, on_error="skip")
    make(options, tmp_path / "skip", workers=2)
    manifest = verify(options, tmp_path / "skip", QUIET)
    assert (manifest["documents"], manifest["skipped"]) == (200, {"damaged file": 1})
    assert "3.parquet" in manifest["errors"][0]


def test_a_difference_between_the_engines_is_said_and_the_shard_made_again(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = recipe(tmp_path, parts=4)
    make(options, tmp_path / "reference")
    # Right for some documents, then wrong.
    extra_characters = iter([0] * 8 + [1] * 10**6)

    def fast(text: str) -> Any:
        return TOKENIZER.encode(text + "!" * next(extra_characters))

    monkeypatch.setattr("amlaunch.preprocess.stages.element.open_engine", lambda *_: Engine(TOKENIZER, True, fast))
    lines: list[str] = []
    make(options, tmp_path / "out", lines=lines)
    assert sum("gave different tokens" in line for line in lines) == 1
    assert shards(tmp_path / "out") == shards(tmp_path / "reference")


def test_no_bos_if_none_is_wanted(tmp_path: Path, texts: list[str]) -> None:
    options = recipe(tmp_path, bos=False, parts=2)
    make(options, tmp_path / "out")
    verify(options, tmp_path / "out", QUIET)
    plain = recipe(tmp_path, parts=2)
    make(plain, tmp_path / "bos")
    assert stream(tmp_path / "out") == [document[1:] for document in stream(tmp_path / "bos")]


def test_a_users_iterator_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def docs(n, part=0, parts=1):\n"
        "    for i in range(part, n, parts):\n"
        "        yield None if i == 3 else {'text': f'number {i}'}\n"
        "def plain():\n    yield 'one'\n    raise KeyError('two')\n"
    )
    policy = TargetPolicy(tmp_path)
    source = {"_target_": "mine.py:docs", "n": 9}
    options = Preprocess(source=source, parts=2)
    parts = run_element(options, 0, tmp_path / "out", QUIET, 2, policy)
    assert [part.documents for part in parts] == [5, 3] and parts[1].cursor.skipped == {"null": 1}
    assert stream(tmp_path / "out")[1] == encoded("number 2")
    verify(options, tmp_path / "out", QUIET, policy)
    with pytest.raises(BadInput, match=r"mine.py:plain has no parameters part and parts"):
        run_element(Preprocess(source={"_target_": "mine.py:plain"}, parts=2), 0, tmp_path / "no", QUIET, 0, policy)
    with pytest.raises(BadInput, match=r"mine.py:plain: after document 0 of part 0: KeyError: 'two'"):
        run_element(Preprocess(source={"_target_": "mine.py:plain"}), 0, tmp_path / "no", QUIET, 0, policy)
    with pytest.raises(BadInput, match="add --allow-target"):
        run_element(Preprocess(source={"_target_": "os.listdir"}), 0, tmp_path / "no", QUIET, 0, policy)


def test_raw_is_nanogpt_s_layout_beside_the_shards(tmp_path: Path, texts: list[str]) -> None:
    options = recipe(tmp_path, format="raw", val_tokens=500, parts=3)
    make(options, tmp_path / "out")
    manifest = verify(options, tmp_path / "out", QUIET)
    for split in ("train", "val"):
        tokens = np.fromfile(tmp_path / "out" / f"{split}.bin", dtype=np.uint16)
        assert tokens.tolist() == [token for document in documents(tmp_path / "out", split) for token in document]
        assert manifest["raw"][f"{split}.bin"]["bytes"] == 2 * len(tokens)


# --- restarts -----------------------------------------------------------------------------------------


def test_a_finished_element_returns_at_once_and_touches_nothing(tmp_path: Path, texts: list[str]) -> None:
    options, out = recipe(tmp_path, val_tokens=300), tmp_path / "out"
    (first,) = make(options, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    lines: list[str] = []
    assert make(options, out, lines=lines) == [first]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert "resuming after 1 finished part (" in lines[0]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
@pytest.mark.parametrize("which", [0, 2, -1])
def test_whatever_is_missing_is_redone_and_only_that(tmp_path: Path, texts: list[str], suffix: str, which: int) -> None:
    options, out = recipe(tmp_path, val_tokens=900), tmp_path / "out"
    (part,) = make(options, out)
    before = everything(out)
    lost = (out / part.shards[which].file).with_suffix(suffix)
    lost.unlink()
    if suffix == ".json":
        (out / "part-00000.json").unlink()  # which vouches for all its shards
    kept = [out / entry.file for entry in part.shards if entry.file != part.shards[which].file]
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert make(options, out) == [part]
    assert everything(out) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == times


def test_half_files_of_a_killed_process_are_cleaned_and_others_left(tmp_path: Path, texts: list[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    own_files, other_file = out / ".train-00000-00003.bin.node.77.tmp", out / ".train-00001-00003.bin.node.78.tmp"
    own_files.touch()
    other_file.touch()
    make(recipe(tmp_path), out)
    assert not own_files.exists() and other_file.exists()


def test_a_stop_file_ends_it_cleanly_and_the_rest_is_identical(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, out = recipe(tmp_path, parts=6), tmp_path / "out"
    make(options, tmp_path / "undisturbed")
    monkeypatch.setattr("amlaunch.preprocess.progress.HEARTBEAT_SECONDS", 0.0)
    folder = ElementDir(tmp_path / "element")
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            folder.root.mkdir(exist_ok=True)
            folder.stop.touch()

    with pytest.raises(StopRequested, match="stop file"):
        run_element(options, 0, out, Progress(folder, say), 0)
    assert len(list(out.glob("part-*"))) == 2 and not list(out.glob(".*.tmp"))
    folder.stop.unlink()
    run_element(options, 0, out, Progress(folder, say), 0)
    assert any("resuming after 2 finished parts" in line for line in lines)
    assert everything(out) == everything(tmp_path / "undisturbed")
    beat = json.loads(folder.progress.read_text())
    assert beat["unit"] == "token" and beat["done"] == beat["total"] > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 5000}, "options.max_tokens was None, is now 5000"),
        ({"val_tokens": 1}, "options.val_tokens was 0, is now 1"),
        ({"encoding": "latin-1"}, "source.encoding was 'utf-8', is now 'latin-1'"),
        ({"exclude": "0007.txt"}, "source.files was 40, is now 39"),
        ({"bos": False}, "options.bos was True, is now False"),
        ({"parts": 2}, "parts was 1, is now 2"),
    ],
)
def test_a_folder_made_from_something_else_is_refused(
    tmp_path: Path, texts: list[str], change: dict[str, Any], message: str
) -> None:
    make(recipe(tmp_path), tmp_path / "out")
    before = everything(tmp_path / "out")
    with pytest.raises(BadInput, match=message) as error:
        make(recipe(tmp_path, **change), tmp_path / "out")
    assert "output_dir" in str(error.value) and everything(tmp_path / "out") == before


def test_the_same_folder_may_be_finished_by_another_number_of_elements(tmp_path: Path, texts: list[str]) -> None:
    options = recipe(tmp_path, elements=3, parts=9)
    make(options, tmp_path / "out", range(1, 2))
    alone = dataclasses.replace(options, elements=1)
    make(alone, tmp_path / "out")
    make(options, tmp_path / "all")
    assert verify(alone, tmp_path / "out", QUIET) == verify(options, tmp_path / "all", QUIET)


def test_the_result_names_every_output_with_its_size(tmp_path: Path, texts: list[str]) -> None:
    out = tmp_path / "out"
    options = recipe(tmp_path, val_tokens=100)
    (part,) = make(options, out)
    outcome = element_result([part], options, 0, out)
    assert all(Path(path).stat().st_size == size for path, size in outcome["outputs"].items())
    assert len(outcome["outputs"]) == 2 * len(part.shards) + 2
    assert outcome["tokens"] == outcome["train_tokens"] + outcome["val_tokens"] == sum(map(len, documents(out)))
    assert (outcome["documents"], outcome["skipped"]) == (39, {"empty": 1})


# --- verify -------------------------------------------------------------------------------------------


def test_the_manifest_lists_all_shards_and_is_written_once(tmp_path: Path, texts: list[str]) -> None:
    options, out = recipe(tmp_path, val_tokens=300, elements=3, parts=5), tmp_path / "out"
    parts = make(options, out)
    verify(options, out, QUIET)
    manifest = read_manifest(out)
    assert manifest["tokenizer"] == TOKENIZER.identity()
    assert [entry["file"] for entry in manifest["splits"]["train"]] == sorted(p.name for p in out.glob("train-*.bin"))
    assert [entry["file"] for entry in manifest["splits"]["val"]] == sorted(p.name for p in out.glob("val-*.bin"))
    assert manifest["tokens"] == sum(part.cursor.tokens for part in parts)
    assert (manifest["documents"], manifest["skipped"], manifest["item_size"]) == (39, {"empty": 1}, 2)
    written = OutputDir(out).manifest.stat().st_mtime_ns
    verify(options, out, QUIET)
    assert OutputDir(out).manifest.stat().st_mtime_ns == written


def test_missing_parts_are_named(tmp_path: Path, texts: list[str]) -> None:
    options = recipe(tmp_path, elements=4, parts=4)
    make(options, tmp_path / "out", range(1, 3))
    with pytest.raises(IncompleteOutput, match="2 of 4 elements not finished: 0, 3"):
        verify(options, tmp_path / "out", QUIET)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-2])])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_damage_is_found_named_set_aside_and_redone(tmp_path: Path, texts: list[str], damage: Any, suffix: str) -> None:
    options, out = recipe(tmp_path, elements=2, parts=2, val_tokens=600), tmp_path / "out"
    make(options, out)
    verify(options, out, QUIET)
    before = everything(out)
    victim = out / f"train-00001-00002{suffix}"
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.bin") if path.stem != victim.stem}
    damage(victim)
    with pytest.raises(
        IncompleteOutput, match=rf"(train-00001-00002\{suffix}|shards of part 1 \(element 1\) are missing)"
    ):
        verify(options, out, QUIET)
    assert not OutputDir(out).manifest.exists(), "no trainer may read it now"
    with pytest.raises(IncompleteOutput, match="not finished: 1"):
        verify(options, out, QUIET)
    make(options, out, range(1, 2))
    verify(options, out, QUIET)
    (out / f"{victim.name}.damaged").unlink(missing_ok=True)
    assert everything(out) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize(
    ("was", "damaged"),
    [
        ('"origin": {', '"oriGin": {'),
        ('"shard_tokens": 7', '"shard_t0kens": 7'),
        ('"gpt2"', '"gpt3"'),
        ('"train": ', '"train": 1'),
        ("{", "["),
    ],
)
def test_a_damaged_part_file_counts_as_none_and_is_written_again(
    tmp_path: Path, texts: list[str], was: str, damaged: str
) -> None:
    options, out = recipe(tmp_path), tmp_path / "out"
    make(options, out)
    record = (out / "part-00000.json").read_text()
    (out / "part-00000.json").write_text(record.replace(was, damaged, 1))
    with pytest.raises(IncompleteOutput, match="shards of part 0"):
        verify(options, out, QUIET)
    make(options, out)
    assert (out / "part-00000.json").read_text() == record


def test_a_wrong_shard_with_a_right_digest_is_found(tmp_path: Path, texts: list[str]) -> None:
    """A writer's bug, not the disk's: the documents do not begin with BOS."""
    from amlaunch.recipes.files import sha256_file

    options, out = recipe(tmp_path), tmp_path / "out"
    (part,) = make(options, out)
    path = out / part.shards[1].file
    tokens = np.memmap(path, dtype="<u2", mode="r+", offset=1024)
    tokens[0] = 7
    tokens.flush()
    for entry in (out / "part-00000.json", path.with_suffix(".json")):
        entry.write_text(entry.read_text().replace(part.shards[1].sha256, sha256_file(path)))
    with pytest.raises(IncompleteOutput, match="does not begin with the beginning-of-sequence"):
        verify(options, out, QUIET)


def test_a_text_that_was_corrected_is_read_again_unless_there_are_shards(tmp_path: Path, texts: list[str]) -> None:
    options, out = recipe(tmp_path), tmp_path / "out"
    make(options, out)
    corpus(tmp_path / "corpus", seed=5)
    with pytest.raises(BadInput, match=rf"If no other run needs them: rm -r {out}; else set another"):
        make(options, out)
    for path in [*out.glob("*.bin"), *out.glob("part-*.json")]:
        path.unlink()
    (part,) = make(options, out)
    assert part.has_complete_files(out)


def test_elements_of_two_origins_are_refused(tmp_path: Path, texts: list[str]) -> None:
    options = recipe(tmp_path, elements=2, parts=2)
    make(options, tmp_path / "one")
    corpus(tmp_path / "corpus", seed=5)
    make(options, tmp_path / "two")
    for path in (tmp_path / "two").glob("*-00001*"):
        shutil.copy(path, tmp_path / "one" / path.name)
    with pytest.raises(BadInput, match=r"element 1 was made with a different source.*: source\.digest"):
        verify(options, tmp_path / "one", QUIET)
    with pytest.raises(BadInput, match=r"options\.shard_tokens was 700, is now 800"):
        verify(dataclasses.replace(options, shard_tokens=800), tmp_path / "two", QUIET)


def test_a_shard_that_nobody_made_here_is_refused_by_name(tmp_path: Path, texts: list[str]) -> None:
    options, out = recipe(tmp_path), tmp_path / "out"
    make(options, out)
    shutil.copy(out / "train-00000-00001.bin", out / "train-00007-00000.bin")
    with pytest.raises(BadInput, match=r"holds shards that no element of this recipe made: train-00007-00000\.bin"):
        verify(options, out, QUIET)


def test_nothing_to_train_on_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").touch()
    make(recipe(tmp_path), tmp_path / "out")
    with pytest.raises(BadInput, match=r"all records were skipped \(1 empty\)"):
        verify(recipe(tmp_path), tmp_path / "out", QUIET)
    (tmp_path / "corpus" / "b.txt").write_text("word " * 300)
    for name, more in (("all", {"val_tokens": 10**6}), ("cut", {"max_tokens": 100, "val_tokens": 99})):
        make(recipe(tmp_path, **more), tmp_path / name)
        with pytest.raises(BadInput, match="tokens went to validation"):
            verify(recipe(tmp_path, **more), tmp_path / name, QUIET)


def test_more_validation_than_text_is_refused_and_a_part_may_be_validation_alone(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for name, rows in (("one", 1), ("nine", 9)):
        (tmp_path / "corpus" / f"{name}.jsonl").write_text('{"text": "a few words"}\n' * rows)
    options = recipe(tmp_path, data_files=f"{tmp_path}/corpus/*.jsonl", elements=2, parts=2, val_tokens=200)
    make(options, tmp_path / "out")
    with pytest.raises(BadInput, match="tokens went to validation"):
        verify(options, tmp_path / "out", QUIET)
    options = dataclasses.replace(options, val_tokens=20)
    make(options, tmp_path / "some")
    manifest = verify(options, tmp_path / "some", QUIET)
    assert manifest["val_tokens"] >= 20 and manifest["train_tokens"] > 0


def test_a_part_cleans_up_after_itself_alone(tmp_path):
    """Part 0 must not remove ``train-00001-00000`` (part 1's first shard, being written)."""
    out = OutputDir(tmp_path)
    own_files = [f".{name}.host.7.tmp" for name in ("train-00000-00003.bin", "val-00000-00000.idx", "part-00000.json")]
    other_files = [
        f".{name}.host.8.tmp"
        for name in ("train-00001-00000.bin", "val-00010-00000.json", "part-00001.json", "manifest.json")
    ]
    for name in own_files + other_files:
        (tmp_path / name).touch()
    assert sorted(path.name for path in out.temporary_files(0)) == sorted(own_files)
