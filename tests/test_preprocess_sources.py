"""Sources: what globs mean, how parts are shared, encodings, JSON lines, Parquet, Hugging Face folders."""

from __future__ import annotations

import gzip
import json
import os
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from preprocess.local import FILES_ENOUGH, fixed_part, glob_regex, open_files, partition
from preprocess.sources import Skipped, Source, open_source
from recipes.errors import BadInput
from recipes.schema import Preprocess


def all_records(options: Preprocess) -> list[list[str | Skipped]]:
    """Per element."""
    return [list(open_source(options, i).records(0)) for i in range(options.elements)]


def check_entering_anywhere(source: Source) -> None:
    whole = list(source.records(0))
    for skip in range(len(whole) + 1):
        assert list(source.records(skip)) == whole[skip:]


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def names(options: Preprocess, index: int = 0) -> list[str]:
    return [file.name for file in open_files(options, index).files]


# --- which files, in which order, whose ---------------------------------------------------------------


def test_two_stars_cross_folders_and_order_does_not_depend_on_where_the_corpus_lies(tmp_path: Path) -> None:
    files = {f"d{i % 3}/e/{i}.txt": str(i) for i in range(12)} | {"top.txt": "t", "d0/no.md": "n"}
    here, there = write(tmp_path / "here", files), write(tmp_path / "else" / "where", files)
    first = names(Preprocess(data_files=f"{here}/**/*.txt"))
    assert sorted(first) == sorted(name for name in files if name.endswith(".txt"))
    assert names(Preprocess(data_files=f"{there}/**/*.txt")) == first
    assert first != sorted(first), "in the order of their digests, a fair mix"


def test_a_file_that_two_patterns_match_is_read_once(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "a", "b.txt": "b"})
    assert sorted(names(Preprocess(data_files=[f"{tmp_path}/*.txt", f"{tmp_path}/a*"]))) == ["a.txt", "b.txt"]


def test_a_file_that_links_lead_to_again_is_read_once_under_its_shortest_name(tmp_path: Path) -> None:
    write(tmp_path, {"d/a.txt": "a", "d/b.txt": "b"})
    (tmp_path / "d" / "self").symlink_to(".")  # else some forty times: glob follows links until the kernel stops it
    (tmp_path / "d" / "again-b.txt").symlink_to("b.txt")
    assert sorted(names(Preprocess(data_files=f"{tmp_path}/**/*.txt"))) == ["d/a.txt", "d/b.txt"]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("**/tests/**", ["a.py", "pkg/b.py"]),
        ("tests/**", ["a.py", "pkg/b.py"]),
        ("b.py", ["a.py", "pkg/tests/c.py", "tests/d.py"]),
        ("[!a]*.py", ["a.py"]),
        ("{here}/pkg/**", ["a.py", "tests/d.py"]),
        ("{here}/*.py", ["pkg/b.py", "pkg/tests/c.py", "tests/d.py"]),
    ],
)
def test_exclude_is_held_against_the_path_below_the_corpus(tmp_path: Path, exclude: str, left: list[str]) -> None:
    here = write(
        tmp_path / "tests" / "corpus", dict.fromkeys(["a.py", "pkg/b.py", "pkg/tests/c.py", "tests/d.py"], "x")
    )
    options = Preprocess(data_files=f"{here}/**/*.py", exclude=exclude.format(here=here))
    assert sorted(names(options)) == left


def test_relative_patterns_start_where_the_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "corpus", {"a.txt": "a", "bad.txt": "b"})
    monkeypatch.chdir(tmp_path)
    assert names(Preprocess(data_files="corpus/*.txt", exclude="corpus/bad.txt")) == ["a.txt"]


@pytest.mark.parametrize(
    ("pattern", "part"), [("/a/b/*.txt", "/a/b"), ("/a/**/c/*.txt", "/a"), ("/a/b.txt", "/a"), ("*.txt", ".")]
)
def test_fixed_part(pattern: str, part: str) -> None:
    assert fixed_part(pattern) == Path(part)


def test_one_star_stays_in_its_folder() -> None:
    import re

    assert re.fullmatch(glob_regex("a/*.py"), "a/b.py") and not re.fullmatch(glob_regex("a/*.py"), "a/b/c.py")
    assert re.fullmatch(glob_regex("a/**/c.py"), "a/c.py") and re.fullmatch(glob_regex("a/**/c.py"), "a/x/y/c.py")


def test_a_pattern_without_a_match_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "a"})
    with pytest.raises(BadInput, match=r"no file matches .*\*\.md"):
        open_source(Preprocess(data_files=[f"{tmp_path}/*.txt", f"{tmp_path}/*.md"]), 0)
    with pytest.raises(BadInput, match="is a folder: write which files"):
        open_source(Preprocess(data_files=str(tmp_path)), 0)
    with pytest.raises(BadInput, match="no file that exclude leaves in"):
        open_source(Preprocess(data_files=f"{tmp_path}/*.txt", exclude="a.*"), 0)


def test_neither_or_both_sources_or_an_index_out_of_range_are_refused() -> None:
    for options in (Preprocess(), Preprocess(dataset="a", data_files="b")):
        with pytest.raises(BadInput, match="dataset"):
            open_source(options, 0)
    for index in (-1, 2):
        with pytest.raises(BadInput, match="from 0 to 1"):
            open_source(Preprocess(data_files="x", elements=2), index)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60), st.data())
def test_parts_are_contiguous_complete_and_never_empty(sizes: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(sizes)))
    ranges = partition(sizes, parts)
    assert [i for part in ranges for i in part] == list(range(len(sizes)))
    assert len(ranges) == parts and all(ranges)


def test_parts_balance_bytes() -> None:
    assert [sum([1000] * 100) // 4, *[len(part) for part in partition([1000] * 100, 4)]] == [25000, 25, 25, 25, 25]
    assert partition([10, 10, 1000, 10, 10], 2) == [range(2), range(2, 5)]
    assert partition([98, 1, 1], 3) == [range(1), range(1, 2), range(2, 3)]


def test_fewer_files_than_elements_is_refused_with_the_number_to_write(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "a", "b.txt": "b"})
    with pytest.raises(BadInput, match=r"only 2 files.*at most 2"):
        open_source(Preprocess(data_files=f"{tmp_path}/*", elements=3), 0)


def test_identity_is_of_names_sizes_and_reading_not_of_place_or_time(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, {"a.txt": "aaa", "b.txt": "b"}) for name in ("one", "two"))
    os.utime(two / "a.txt", (1, 1))
    identity = open_source(Preprocess(data_files=f"{one}/*"), 0).identity()
    assert open_source(Preprocess(data_files=f"{two}/*"), 0).identity() == identity
    assert open_source(Preprocess(data_files=f"{two}/*", encoding="latin-1"), 0).identity() != identity
    write(two, {"a.txt": "aaaa"})
    assert open_source(Preprocess(data_files=f"{two}/*"), 0).identity() != identity


# --- text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "encoding", "text"),
    [
        ("naïve\r\n東京".encode(), "utf-8", "naïve\r\n東京"),
        ("naïve".encode("latin-1"), "latin-1", "naïve"),
        ("東京".encode("shift_jis"), "shift_jis", "東京"),
        (b"# -*- coding: latin-1 -*-\nx = '\xe9'\n", "python", "# -*- coding: latin-1 -*-\nx = 'é'\n"),
        (b"\xef\xbb\xbfx = 1\n", "python", "x = 1\n"),
        ("x = 'é'".encode(), "python", "x = 'é'"),
    ],
)
def test_encodings(tmp_path: Path, raw: bytes, encoding: str, text: str) -> None:
    write(tmp_path, {"a.txt": raw})
    assert all_records(Preprocess(data_files=f"{tmp_path}/a.txt", encoding=encoding)) == [[text]]


BAD = [
    (b"abc\xff", "utf-8", "byte offset 3 is not utf-8"),
    (b"x = 1\ny = 2\nz = '\xe9'\n", "python", "byte offset 17 is not utf-8"),
    (b"# \xe9\n", "python", "byte offset 2 is not utf-8"),
    (b"# coding: klingon\n", "python", "unknown encoding"),
    (b"# coding: hex\n", "python", "not a text encoding"),
]


@pytest.mark.parametrize(("raw", "encoding", "says"), BAD)
def test_undecodable_is_an_error_with_file_and_byte_or_skipped_or_replaced(
    tmp_path: Path, raw: bytes, encoding: str, says: str
) -> None:
    write(tmp_path, {"bad.txt": raw})
    options = {"data_files": f"{tmp_path}/*.txt", "encoding": encoding}
    with pytest.raises(BadInput, match=f"bad.txt: .*{says}"):
        all_records(Preprocess(**options))
    assert all_records(Preprocess(**options, encoding_errors="skip")) == [[Skipped("undecodable")]]
    if "text encoding" not in says:
        assert all_records(Preprocess(**options, encoding_errors="replace")) == [[raw.decode("utf-8", "replace")]]


@pytest.mark.parametrize("encoding", ["undefined", "idna"])
def test_codecs_with_errors_of_their_own_are_named_or_skipped(tmp_path: Path, encoding: str) -> None:
    write(tmp_path, {"bad.txt": f"# coding: {encoding}\nxn--\xff".encode("latin-1")})
    options = {"data_files": f"{tmp_path}/*.txt", "encoding": "python"}
    for errors in ("strict", "replace"):
        with pytest.raises(BadInput, match=r"bad\.txt: .*(undefined encoding|not ascii|error handling)"):
            all_records(Preprocess(**options, encoding_errors=errors))
    assert all_records(Preprocess(**options, encoding_errors="skip")) == [[Skipped("undecodable")]]


@pytest.mark.parametrize("encoding", ["utf-9", "hex", "pyhton"])
def test_an_encoding_that_is_none_is_refused_before_anything_is_read(encoding: str) -> None:
    with pytest.raises(BadInput, match="knows no text encoding"):
        open_source(Preprocess(data_files="/nowhere/*", encoding=encoding), 0)


def test_text_is_entered_anywhere(tmp_path: Path) -> None:
    write(tmp_path, {f"{i}.txt": str(i) for i in range(5)})
    check_entering_anywhere(open_source(Preprocess(data_files=f"{tmp_path}/*"), 0))


# --- JSON lines and Parquet ---------------------------------------------------------------------------


def test_json_lines_plain_and_gzip(tmp_path: Path) -> None:
    rows = ['{"text": "a\\u00e9"}', '{"text": null, "x": 1}', "", '{"text": "c"}', "  "]
    body = "\n".join(rows).encode()
    write(tmp_path, {"a.jsonl": body, "b.jsonl.gz": gzip.compress(body)})
    source = open_source(Preprocess(data_files=f"{tmp_path}/*"), 0)
    assert list(source.records(0)) == 2 * ["aé", Skipped("null"), "c"]
    check_entering_anywhere(source)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": ', "a.jsonl:2: not valid JSON"),
        ('["text"]', "a.jsonl:2: a JSON object is expected"),
        ('{"txet": "x"}', "a.jsonl:2: no column 'text'.*did you mean 'txet'"),
        ('{"text": 3}', "a.jsonl:2: column 'text' holds int"),
        (b'{"text": "\xff"}', "a.jsonl:2: not valid JSON"),
        ("[" * 100_000, "a.jsonl:2: not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, says: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    write(tmp_path, {"a.jsonl": b'{"text": "x"}\n' + raw + b"\n"})
    with pytest.raises(BadInput, match=says):
        all_records(Preprocess(data_files=f"{tmp_path}/*"))


def test_a_truncated_gzip_is_named(tmp_path: Path) -> None:
    body = gzip.compress(b'{"text": "xyz"}\n' * 1000)
    write(tmp_path, {"a.jsonl.gz": body[:-12], "b.jsonl.gz": b"not gzip"})
    for name in "ab":
        with pytest.raises(BadInput, match=f"{name}.jsonl.gz: damaged or truncated gzip"):
            all_records(Preprocess(data_files=f"{tmp_path}/{name}.*"))


def parquet(path: Path, texts: list[str | None], group: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=group)


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    texts: list[str | None] = [f"text {i}" for i in range(30)]
    texts[4] = None
    parquet(tmp_path / "a.parquet", texts[:23], 5)
    parquet(tmp_path / "b.parquet", texts[23:], 4)
    expected = [Skipped("null") if text is None else text for text in texts]
    for elements in (1, 2, 3, 7):
        options = Preprocess(data_files=f"{tmp_path}/*.parquet", elements=elements)
        parts = all_records(options)
        assert sorted(map(str, list(chain.from_iterable(parts)))) == sorted(map(str, expected))
        assert all(parts)
        check_entering_anywhere(open_source(options, elements - 1))
    with pytest.raises(BadInput, match="only 7 files"):
        open_source(Preprocess(data_files=f"{tmp_path}/*.parquet", elements=8), 0)


def test_many_parquet_files_are_shared_whole_without_opening_them_all(tmp_path: Path) -> None:
    write(tmp_path, {f"{i:03d}.parquet": b"never opened" for i in range(2 * FILES_ENOUGH)})
    options = Preprocess(data_files=f"{tmp_path}/*", elements=2)
    assert [len(open_files(options, i).pieces) for i in (0, 1)] == [FILES_ENOUGH, FILES_ENOUGH]


def test_a_parquet_column_that_is_missing_or_not_text_and_damage_are_named(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", ["x" * 500 + str(i) for i in range(500)], 100)
    files = f"{tmp_path}/a.parquet"
    with pytest.raises(BadInput, match=r"a.parquet: no column 'txt'.*did you mean 'text'"):
        all_records(Preprocess(data_files=files, text_column="txt"))
    with pytest.raises(BadInput, match=r"a.parquet: column 'id' holds int"):
        all_records(Preprocess(data_files=files, text_column="id"))
    raw = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BadInput, match=r"a.parquet: not a whole Parquet file"):
        all_records(Preprocess(data_files=files))


# --- Hugging Face -------------------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for i in range(3):
        parquet(tmp_path / "set" / f"train-{i:05d}-of-00003.parquet", [f"{i}-{j}" for j in range(4)] + [None], 2)
    return tmp_path / "set"


@pytest.mark.slow
def test_a_folder_in_hugging_face_style(hub_folder: Path) -> None:
    expected = [f"{i}-{j}" for i in range(3) for j in range(4)]
    for elements in (1, 2, 3):
        options = Preprocess(dataset=str(hub_folder), elements=elements)
        parts = all_records(options)
        found = list(chain.from_iterable(parts))
        assert sorted(text for text in found if isinstance(text, str)) == expected
        assert found.count(Skipped("null")) == 3
        check_entering_anywhere(open_source(options, 0))
    refused = [
        ({"elements": 4}, "has 3 files to share between them: set it to at most 3"),
        ({"text_column": "txt"}, "no column 'txt'.*did you mean 'text'"),
        ({"text_column": "id"}, "column 'id' holds int"),
        ({"split": "test"}, "train"),
        ({"set_name": "other"}, "other"),
    ]
    for change, says in refused:
        with pytest.raises(BadInput, match=says):
            all_records(Preprocess(**{"dataset": str(hub_folder), **change}))
    with pytest.raises(BadInput, match="nowhere"):
        all_records(Preprocess(dataset="./nowhere/at/all"))
    identity = open_source(Preprocess(dataset=str(hub_folder)), 0).identity()
    parquet(hub_folder / "train-00000-of-00003.parquet", ["more"] * 50, 2)
    assert open_source(Preprocess(dataset=str(hub_folder)), 0).identity() != identity


def test_what_is_said_where_the_hub_cannot_be_reached() -> None:
    from preprocess.hub import unreachable

    message = unreachable(Preprocess(dataset="HuggingFaceFW/fineweb"), ConnectionError("no route"))
    for word in ("HuggingFaceFW/fineweb", "no route", "HF_HOME", "data_files", "DIR"):
        assert word in message


def test_json_is_read_as_lines_not_as_one_value(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": "\n".join(json.dumps({"text": f"l{i}\u2028x"}, ensure_ascii=False) for i in range(3))})
    assert all_records(Preprocess(data_files=f"{tmp_path}/*")) == [[f"l{i}\u2028x" for i in range(3)]]
