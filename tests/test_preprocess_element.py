"""Elements and verify, in this process: exactly-once, budgets, splits, restarts, damage."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess.element import Documents, Limits, next_shard, result, run_element, share
from preprocess.parts import START, OutputDir
from preprocess.progress import Progress, StopRequested
from preprocess.shards import read_header, read_manifest
from preprocess.sources import Record, Skipped
from preprocess.tokenizer import load_tokenizer
from preprocess.verify import NotWhole, verify
from recipes.errors import BadInput
from recipes.rundir import ElementDir
from recipes.schema import Preprocess
from tests.preprocess_helpers import corpus, documents, everything, make

TOKENIZER = load_tokenizer("gpt2")
QUIET = Progress(say=lambda text: None)


@pytest.fixture(autouse=True)
def _one_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building it takes 0.1 s, and a name always means the same one."""
    monkeypatch.setattr("preprocess.element.load_tokenizer", functools.cache(load_tokenizer))


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    return corpus(tmp_path / "corpus")


def recipe(tmp_path: Path, **more: Any) -> Preprocess:
    return Preprocess(**{"data_files": f"{tmp_path}/corpus/**/*.txt", "shard_tokens": 700, **more})


def encoded(text: str) -> tuple[int, ...]:
    return (50256, *TOKENIZER.encoding.encode_ordinary(text))


# --- every document once ------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 2, 7])
def test_any_number_of_elements_holds_every_document_exactly_once(
    tmp_path: Path, texts: list[str], elements: int
) -> None:
    options = recipe(tmp_path, elements=elements)
    parts = make(options, tmp_path / "out")
    found = sorted(map(tuple, documents(tmp_path / "out", elements)))
    assert found == sorted(encoded(text) for text in texts if text)
    assert sum(part.cursor.skipped.get("empty", 0) for part in parts) == 1
    assert sum(part.cursor.records for part in parts) == len(texts)


class Listed:
    """A source of given records."""

    def __init__(self, records: list[Record]):
        self.all = records

    def identity(self) -> dict[str, Any]:
        return {}

    def records(self, skip: int) -> Any:
        return iter(self.all[skip:])


record = st.one_of(st.text("abc ü\n", max_size=60), st.just(Skipped("null")))


@settings(deadline=None)
@given(
    st.lists(record, max_size=15),
    st.integers(1, 60),
    st.integers(0, 40),
    st.one_of(st.none(), st.integers(41, 200)),
)
def test_shards_cut_a_stream_of_any_documents(records: list[Record], shard: int, val: int, total: int | None) -> None:
    """All laws of the cut at once; each shard from a fresh stream, as after a kill, or from the running one: the same."""
    limits = Limits(total, val, shard)
    running = Documents(Listed(records), TOKENIZER)
    cursor, splits, joined = START, [], []
    while limits.left(cursor) != 0:
        running.enter(cursor)
        pieces = [(tokens.tolist(), after) for tokens, after in next_shard(running, cursor, limits)]
        fresh = Documents(Listed(records), TOKENIZER)
        fresh.enter(cursor)
        assert [(tokens.tolist(), after) for tokens, after in next_shard(fresh, cursor, limits)] == pieces
        if not pieces:
            break
        assert sum(len(tokens) for tokens, _ in pieces) <= shard or len(pieces) == 1
        splits.append(limits.split(cursor))
        joined += [tokens for tokens, _ in pieces]
        cursor = pieces[-1][1]
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
    make(Preprocess(data_files=f"{tmp_path}/c/*", shard_tokens=700), tmp_path / "out")
    sizes = [read_header(path).tokens for path in sorted((tmp_path / "out").glob("*.bin"))]
    assert sizes == [600, 300, 1500, 700]


# --- budgets and splits -------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "elements"), [(1000, 1), (1001, 2), (1003, 4), (4, 4)])
def test_the_budget_is_exact_and_shared(tmp_path: Path, texts: list[str], budget: int, elements: int) -> None:
    parts = make(recipe(tmp_path, max_tokens=budget, elements=elements), tmp_path / "out")
    assert [part.cursor.tokens for part in parts] == [share(budget, i, elements) for i in range(elements)]
    assert sum(part.cursor.tokens for part in parts) == budget


def test_a_budget_reads_no_further_than_it_needs(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a b c d e f"}\nbroken\n')
    make(Preprocess(data_files=f"{tmp_path}/x.jsonl", max_tokens=5), tmp_path / "out")
    assert documents(tmp_path / "out") == [[50256, 64, 275, 269, 288]]


def test_a_source_that_ends_before_the_budget_is_said(tmp_path: Path, texts: list[str]) -> None:
    lines: list[str] = []
    (part,) = make(recipe(tmp_path, max_tokens=10**9), tmp_path / "out", lines=lines)
    assert any(f"the source ended at {part.cursor.tokens:,} of 1,000,000,000" in line for line in lines)


def test_validation_is_the_first_whole_documents_and_disjoint(tmp_path: Path, texts: list[str]) -> None:
    options = recipe(tmp_path, val_tokens=900, elements=2)
    everything_parts = make(dataclasses.replace(options, val_tokens=0), tmp_path / "plain")
    make(options, tmp_path / "out")
    for index, whole in enumerate(everything_parts):
        plain = [d for path in whole.shards for d in documents_of(tmp_path / "plain" / path.file)]
        val = [d for path in sorted((tmp_path / "out").glob(f"val-{index:05d}-*.bin")) for d in documents_of(path)]
        train = [d for path in sorted((tmp_path / "out").glob(f"train-{index:05d}-*.bin")) for d in documents_of(path)]
        assert val + train == plain
        assert sum(map(len, val[:-1])) < 450 <= sum(map(len, val))


def documents_of(path: Path) -> list[list[int]]:
    from tests.preprocess_helpers import cut

    return cut(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_tokens": 500, "val_tokens": 500}, "leave nothing to train on"),
        ({"max_tokens": 3, "elements": 4}, "cannot be shared between 4"),
        ({"shard_tokens": 2**31}, "1 to 2,147,483,647"),
        ({"shard_tokens": 0}, "1 to 2,147,483,647"),
        ({"tokenizer": "gpt-2"}, "did you mean 'gpt2'"),
    ],
)
def test_recipes_that_cannot_work_are_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    (tmp_path / "corpus").mkdir()
    for i in range(4):
        (tmp_path / "corpus" / f"{i}.txt").write_text("word " * 300)
    with pytest.raises(BadInput, match=says):
        make(recipe(tmp_path, **change), tmp_path / "out")


# --- restarts -----------------------------------------------------------------------------------------


def test_a_finished_element_returns_at_once_and_touches_nothing(tmp_path: Path, texts: list[str]) -> None:
    options, out = recipe(tmp_path, val_tokens=300), tmp_path / "out"
    (first,) = make(options, out)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    lines: list[str] = []
    assert make(options, out, lines=lines) == [first]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert "already there" in lines[-1]


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
    mine, others = out / ".train-00000-00003.bin.node.77.tmp", out / ".train-00001-00003.bin.node.78.tmp"
    mine.touch()
    others.touch()
    make(recipe(tmp_path), out)
    assert not mine.exists() and others.exists()


def test_a_stop_file_ends_it_cleanly_and_the_rest_is_identical(
    tmp_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, out = recipe(tmp_path), tmp_path / "out"
    make(options, tmp_path / "undisturbed")
    monkeypatch.setattr("preprocess.progress.LOOK_SECONDS", 0.0)
    folder = ElementDir(tmp_path / "element")
    wrote: list[str] = []

    def say(line: str) -> None:
        wrote.append(line)
        if len(wrote) == 2:
            folder.root.mkdir(exist_ok=True)
            folder.stop.touch()

    with pytest.raises(StopRequested, match="stop file"):
        run_element(options, 0, out, Progress(folder, say))
    assert len(list(out.glob("*.bin"))) == 2 and not list(out.glob(".*.tmp"))
    folder.stop.unlink()
    run_element(options, 0, out, Progress(folder, say))
    assert any("goes on after 2 whole shards" in line for line in wrote)
    assert everything(out) == everything(tmp_path / "undisturbed")
    beat = json.loads(folder.progress.read_text())
    assert beat["unit"] == "token" and beat["done"] > 0 and beat["total"] is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_tokens": 5000}, "options.max_tokens was None, is 5000"),
        ({"val_tokens": 1}, "options.val_tokens was 0, is 1"),
        ({"encoding": "latin-1"}, "source.encoding was 'utf-8', is 'latin-1'"),
        ({"exclude": "0007.txt"}, "source.files was 40, is 39"),
    ],
)
def test_a_folder_made_from_something_else_is_refused(
    tmp_path: Path, texts: list[str], change: dict[str, Any], says: str
) -> None:
    make(recipe(tmp_path), tmp_path / "out")
    before = everything(tmp_path / "out")
    with pytest.raises(BadInput, match=says) as error:
        make(recipe(tmp_path, **change), tmp_path / "out")
    assert "output_dir" in str(error.value) and everything(tmp_path / "out") == before


def test_another_element_of_another_recipe_is_refused_too(tmp_path: Path, texts: list[str]) -> None:
    make(recipe(tmp_path, elements=2), tmp_path / "out", range(1))
    with pytest.raises(BadInput, match="was 2, is 3"):
        make(recipe(tmp_path, elements=3), tmp_path / "out", range(2, 3))


def test_the_result_names_every_output_with_its_size(tmp_path: Path, texts: list[str]) -> None:
    out = tmp_path / "out"
    (part,) = make(recipe(tmp_path, val_tokens=100), out)
    told = result(part, out)
    assert all(Path(path).stat().st_size == size for path, size in told["outputs"].items())
    assert len(told["outputs"]) == 2 * len(part.shards) + 1
    assert told["tokens"] == told["train_tokens"] + told["val_tokens"] == sum(map(len, documents(out)))
    assert (told["documents"], told["skipped"]) == (39, {"empty": 1})


# --- verify -------------------------------------------------------------------------------------------


def test_the_manifest_lists_all_shards_and_is_written_once(tmp_path: Path, texts: list[str]) -> None:
    options, out = recipe(tmp_path, val_tokens=300, elements=3), tmp_path / "out"
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
    options = recipe(tmp_path, elements=4)
    make(options, tmp_path / "out", range(1, 3))
    with pytest.raises(NotWhole, match="2 of 4 elements are not finished: 0, 3"):
        verify(options, tmp_path / "out", QUIET)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-2])])
@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_damage_is_found_named_set_aside_and_redone(tmp_path: Path, texts: list[str], damage: Any, suffix: str) -> None:
    options, out = recipe(tmp_path, elements=2, val_tokens=600), tmp_path / "out"
    make(options, out)
    verify(options, out, QUIET)
    before = everything(out)
    victim = out / f"train-00001-00002{suffix}"
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.bin") if path.stem != victim.stem}
    damage(victim)
    with pytest.raises(NotWhole, match=rf"train-00001-00002\{suffix} \(element 1\)"):
        verify(options, out, QUIET)
    assert not OutputDir(out).manifest.exists(), "no trainer may read it now"
    with pytest.raises(NotWhole, match="not finished: 1"):
        verify(options, out, QUIET)
    make(options, out)
    verify(options, out, QUIET)
    (out / f"{victim.name}.damaged").unlink(missing_ok=True)
    assert everything(out) == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


@pytest.mark.parametrize(
    ("was", "harmed"),
    [('"origin": {', '"oriGin": {'), ('"elements": 1', '"eleme0ts": 1'), ('"gpt2"', '"gpt3"'), ('"train": ', '"train": 1'), ("{", "[")],
)
def test_a_damaged_part_file_counts_as_none_and_is_written_again(tmp_path: Path, texts: list[str], was: str, harmed: str) -> None:
    options, out = recipe(tmp_path), tmp_path / "out"
    make(options, out)
    whole = (out / "part-00000.json").read_text()
    (out / "part-00000.json").write_text(whole.replace(was, harmed, 1))
    with pytest.raises(NotWhole, match="not finished: 0"):
        verify(options, out, QUIET)
    make(options, out)
    assert (out / "part-00000.json").read_text() == whole


def test_a_wrong_shard_with_a_right_digest_is_found(tmp_path: Path, texts: list[str]) -> None:
    """A writer's bug, not the disk's: the documents do not begin with BOS."""
    import numpy as np

    from recipes.files import sha256_file

    options, out = recipe(tmp_path), tmp_path / "out"
    (part,) = make(options, out)
    path = out / part.shards[1].file
    tokens = np.memmap(path, dtype="<u2", mode="r+", offset=1024)
    tokens[0] = 7
    tokens.flush()
    for entry in (out / "part-00000.json", path.with_suffix(".json")):
        entry.write_text(entry.read_text().replace(part.shards[1].sha256, sha256_file(path)))
    with pytest.raises(NotWhole, match="does not begin with the beginning-of-sequence"):
        verify(options, out, QUIET)


def test_elements_of_two_origins_are_refused(tmp_path: Path, texts: list[str]) -> None:
    options = recipe(tmp_path, elements=2)
    make(options, tmp_path / "one")
    corpus(tmp_path / "corpus", seed=5)
    make(options, tmp_path / "two")
    for path in (tmp_path / "two").glob("*-00001*"):
        shutil.copy(path, tmp_path / "one" / path.name)
    with pytest.raises(BadInput, match=r"element 1 was made from something else: source\.digest"):
        verify(options, tmp_path / "one", QUIET)
    with pytest.raises(BadInput, match=r"options\.shard_tokens was 700, is 800"):
        verify(dataclasses.replace(options, shard_tokens=800), tmp_path / "two", QUIET)


def test_nothing_to_train_on_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").touch()
    make(recipe(tmp_path), tmp_path / "out")
    with pytest.raises(BadInput, match="the source is empty"):
        verify(recipe(tmp_path), tmp_path / "out", QUIET)
    (tmp_path / "corpus" / "b.txt").write_text("word " * 300)
    for name, more in (("all", {"val_tokens": 10**6}), ("cut", {"max_tokens": 100, "val_tokens": 99})):
        make(recipe(tmp_path, **more), tmp_path / name)
        with pytest.raises(BadInput, match="tokens went to validation"):
            verify(recipe(tmp_path, **more), tmp_path / name, QUIET)


def test_an_element_whose_one_document_is_validation_does_not_break_the_run(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for name, rows in (("one", 1), ("nine", 9)):
        (tmp_path / "corpus" / f"{name}.jsonl").write_text('{"text": "a few words"}\n' * rows)
    options = recipe(tmp_path, data_files=f"{tmp_path}/corpus/*.jsonl", elements=2, val_tokens=2)
    parts = make(options, tmp_path / "out")
    assert sorted(part.documents for part in parts) == [1, 9] and 0 in [part.cursor.train for part in parts]
    assert len(verify(options, tmp_path / "out", QUIET)["splits"]["train"]) > 0


def test_an_element_cleans_up_after_itself_alone(tmp_path):
    """Element 0 must not take ``train-00001-00000`` (element 1's first shard, being written) for its own."""
    out = OutputDir(tmp_path)
    mine = [f".{name}.host.7.tmp" for name in ("train-00000-00003.bin", "val-00000-00000.idx", "part-00000.json", "origin-00000.json")]
    theirs = [f".{name}.host.8.tmp" for name in ("train-00001-00000.bin", "val-00010-00000.json", "part-00001.json", "manifest.json")]
    for name in mine + theirs:
        (tmp_path / name).touch()
    assert sorted(path.name for path in out.leftovers(0)) == sorted(mine)
