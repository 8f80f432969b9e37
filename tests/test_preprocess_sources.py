"""Sources: what globs mean, how parts are shared, encodings, JSON lines, Parquet, Hugging Face folders."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amlaunch.preprocess.sources.file_parts import FileSlice, assign_parts, assign_val_tokens, cut_into_parts, partition
from amlaunch.preprocess.sources.local_files import glob_regex, glob_root, open_files
from amlaunch.preprocess.sources.readers import json_parser, read_slice
from amlaunch.preprocess.sources.records import DamagedRecord, Record, SkippedRecord
from amlaunch.preprocess.sources.source import Source, open_source
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Preprocess


def all_records(options: Preprocess, skip_bad: bool = False) -> list[Record]:
    """Of all parts, in order. Raises BadInput for a damaged one, as an element does, unless they are asked for."""
    source = open_source(options)
    records = [record for part in range(len(source.sizes)) for record in source.records(part, 0)]
    for record in records:
        if isinstance(record, DamagedRecord) and not skip_bad:
            raise BadInput(record.message)
    return records


def check_entering_anywhere(source: Source) -> None:
    for part in range(len(source.sizes)):
        all_of_part = list(source.records(part, 0))
        for skip in range(len(all_of_part) + 1):
            assert list(source.records(part, skip)) == all_of_part[skip:]


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def names(options: Preprocess) -> list[str]:
    return [file.name for file in open_files(options).files]


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
    assert glob_root(pattern) == Path(part)


def test_one_star_stays_in_its_folder() -> None:
    import re

    assert re.fullmatch(glob_regex("a/*.py"), "a/b.py") and not re.fullmatch(glob_regex("a/*.py"), "a/b/c.py")
    assert re.fullmatch(glob_regex("a/**/c.py"), "a/c.py") and re.fullmatch(glob_regex("a/**/c.py"), "a/x/y/c.py")


def test_a_pattern_without_a_match_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "a"})
    with pytest.raises(BadInput, match=r"no file matches .*\*\.md"):
        open_source(Preprocess(data_files=[f"{tmp_path}/*.txt", f"{tmp_path}/*.md"]))
    with pytest.raises(BadInput, match="is a folder"):
        open_source(Preprocess(data_files=str(tmp_path)))
    with pytest.raises(BadInput, match="exclude: excludes every file that matches"):
        open_source(Preprocess(data_files=f"{tmp_path}/*.txt", exclude="a.*"))


@pytest.mark.parametrize("options", [{}, {"dataset": "a", "data_files": "b"}])
def test_neither_or_both_sources_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(BadInput, match="set exactly one of dataset"):
        open_source(Preprocess(**options))


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


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=40), st.integers(1, 9))
def test_elements_are_balanced_and_begin_at_the_front(sizes: list[int], elements: int) -> None:
    found = assign_parts(sizes, elements)
    loads = [
        sum(size for size, owner in zip(sizes, found, strict=True) if owner == element) for element in range(elements)
    ]
    assert max(loads) - min(loads) <= max(sizes) + len(sizes)
    assert sorted(set(found)) == list(range(min(elements, len(sizes))))


@given(st.lists(st.integers(0, 2**42), min_size=1, max_size=40), st.integers(0, 2**40))
def test_validation_is_shared_out_to_the_token(sizes: list[int], val: int) -> None:
    shares = assign_val_tokens(sizes, val)
    assert sum(shares) == val and min(shares) >= 0
    if val <= sum(size // 8 for size in sizes):
        assert all(share <= size // 8 for share, size in zip(shares, sizes, strict=True))
        assert [bool(share) for share in shares if share] == [True] * sum(map(bool, shares))


class Sparse:
    """A file of any size that nobody reads."""

    def __init__(self, name: str, size: int):
        self.name, self.size, self.location = name, size, name


@given(
    st.lists(
        st.tuples(st.sampled_from(["a.parquet", "b.jsonl", "c.txt", "d.jsonl.gz"]), st.integers(0, 2**45)),
        min_size=1,
        max_size=8,
    ),
    st.one_of(st.none(), st.integers(1, 2**43)),
)
def test_parts_cover_every_byte_once_whatever_the_size(files: list[tuple[str, int]], budget: int | None) -> None:
    parts = cut_into_parts(
        [Sparse(*file) for file in files], Preprocess(max_tokens=budget, shard_tokens=10**9 + 10**12)
    )
    slices = [(piece.file, piece.begin, piece.end) for part in parts for piece in part]
    for file in {id(file): file for file, _, _ in slices}.values():
        ranges = [(begin, end) for other, begin, end in slices if other is file]
        assert ranges[0][0] == 0 and ranges[-1][1] == file.size
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
    assert sum(end - begin for _, begin, end in slices) == sum(size for _, size in files) and all(parts)


def test_the_number_of_parts_can_be_given_and_does_not_depend_on_elements(tmp_path: Path) -> None:
    write(tmp_path, {f"{i}.txt": "x" * 1000 for i in range(10)})
    for options in ({"parts": 3}, {"parts": 3, "elements": 2, "num_workers": 7}):
        assert len(open_source(Preprocess(data_files=f"{tmp_path}/*", **options)).sizes) == 3
    with pytest.raises(BadInput, match="at most 10 parts"):
        open_source(Preprocess(data_files=f"{tmp_path}/*", parts=11))


def test_identity_is_of_names_sizes_and_reading_not_of_place_or_time(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name, {"a.txt": "aaa", "b.txt": "b"}) for name in ("one", "two"))
    os.utime(two / "a.txt", (1, 1))
    identity = open_source(Preprocess(data_files=f"{one}/*")).identity()
    assert open_source(Preprocess(data_files=f"{two}/*")).identity() == identity
    assert open_source(Preprocess(data_files=f"{two}/*", encoding="latin-1")).identity() != identity
    write(two, {"a.txt": "aaaa"})
    assert open_source(Preprocess(data_files=f"{two}/*")).identity() != identity


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
    assert all_records(Preprocess(data_files=f"{tmp_path}/a.txt", encoding=encoding)) == [text]


UNDECODABLE = [
    (b"abc\xff", "utf-8", "byte 3 is not valid utf-8"),
    (b"x = 1\ny = 2\nz = '\xe9'\n", "python", "byte 17 is not valid utf-8"),
    (b"# \xe9\n", "python", "byte 2 is not valid utf-8"),
    (b"# coding: klingon\n", "python", "unknown encoding"),
    (b"# coding: hex\n", "python", "not a text encoding"),
]


@pytest.mark.parametrize(("raw", "encoding", "message"), UNDECODABLE)
def test_undecodable_is_an_error_with_file_and_byte_or_skipped_or_replaced(
    tmp_path: Path, raw: bytes, encoding: str, message: str
) -> None:
    write(tmp_path, {"bad.txt": raw})
    options = {"data_files": f"{tmp_path}/*.txt", "encoding": encoding}
    with pytest.raises(BadInput, match=f"bad.txt: .*{message}"):
        all_records(Preprocess(**options))
    assert all_records(Preprocess(**options, encoding_errors="skip")) == [SkippedRecord("undecodable")]
    if "text encoding" not in message:
        assert all_records(Preprocess(**options, encoding_errors="replace")) == [raw.decode("utf-8", "replace")]


@pytest.mark.parametrize("encoding", ["undefined", "idna"])
def test_codecs_with_errors_of_their_own_are_named_or_skipped(tmp_path: Path, encoding: str) -> None:
    write(tmp_path, {"bad.txt": f"# coding: {encoding}\nxn--\xff".encode("latin-1")})
    options = {"data_files": f"{tmp_path}/*.txt", "encoding": "python"}
    for errors in ("strict", "replace"):
        with pytest.raises(BadInput, match=r"bad\.txt: .*(undefined encoding|not valid ascii|error handling)"):
            all_records(Preprocess(**options, encoding_errors=errors))
    assert all_records(Preprocess(**options, encoding_errors="skip")) == [SkippedRecord("undecodable")]


@pytest.mark.parametrize("encoding", ["utf-9", "hex", "pyhton"])
def test_an_encoding_that_is_none_is_refused_before_anything_is_read(encoding: str) -> None:
    with pytest.raises(BadInput, match="unknown text encoding"):
        open_source(Preprocess(data_files="/nowhere/*", encoding=encoding))


def test_text_is_entered_anywhere(tmp_path: Path) -> None:
    write(tmp_path, {f"{i}.txt": str(i) for i in range(5)})
    check_entering_anywhere(open_source(Preprocess(data_files=f"{tmp_path}/*")))


# --- JSON lines and Parquet ---------------------------------------------------------------------------


def test_json_lines_plain_gzip_and_zstd(tmp_path: Path) -> None:
    rows = ['{"text": "a\\u00e9"}', '{"text": null, "x": 1}', "", '{"text": "c"}', "  "]
    body = "\n".join(rows).encode()
    write(
        tmp_path,
        {"a.jsonl": body, "b.jsonl.gz": gzip.compress(body), "c.jsonl.zst": pa.compress(body, "zstd", asbytes=True)},
    )
    options = Preprocess(data_files=f"{tmp_path}/*", parts=3)
    assert all_records(options) == 3 * ["aé", SkippedRecord("null"), "c"]
    check_entering_anywhere(open_source(options))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "a.jsonl:2: not valid JSON"),
        ('["text"]', "a.jsonl:2: expected a JSON object"),
        ('{"txet": "x"}', "a.jsonl:2: no column 'text'.*did you mean 'txet'"),
        ('{"text": 3}', "a.jsonl:2: column 'text' holds int"),
        (b'{"text": "\xff"}', "a.jsonl:2: not valid JSON"),
        ("[" * 100_000, "a.jsonl:2: not valid JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str | bytes, message: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    write(tmp_path, {"a.jsonl": b'{"text": "x"}\n' + raw + b"\n"})
    with pytest.raises(BadInput, match=message):
        all_records(Preprocess(data_files=f"{tmp_path}/*"))


def test_a_truncated_gzip_is_named(tmp_path: Path) -> None:
    body = gzip.compress(b'{"text": "xyz"}\n' * 1000)
    write(tmp_path, {"a.jsonl.gz": body[:-12], "b.jsonl.gz": b"not gzip"})
    compressed = pa.compress(b'{"text": "xyz"}\n' * 1000, "zstd", asbytes=True)
    write(tmp_path, {"c.jsonl.zst": compressed[:-9], "d.jsonl.zst": b"not zstd"})
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.jsonl.zst", "d.jsonl.zst"):
        with pytest.raises(BadInput, match=f"{name}: damaged or truncated {'gzip' if 'gz' in name else 'zstd'}"):
            all_records(Preprocess(data_files=f"{tmp_path}/{name}"))
        assert isinstance(all_records(Preprocess(data_files=f"{tmp_path}/{name}"), skip_bad=True)[-1], DamagedRecord)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.one_of(st.text(max_size=40), st.none(), st.just("long " * 300)), max_size=30), st.integers(1, 12))
def test_slices_of_json_lines_give_each_line_once(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str | None], count: int
) -> None:
    """Whatever byte a slice begins at, inside a line, a character or an escape; read by column or line by line."""
    folder = tmp_path_factory.mktemp("json")
    lines = [json.dumps({"id": i, "text": text}, ensure_ascii=bool(i % 2)) for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    file = open_files(Preprocess(data_files=f"{folder}/*")).files[0]
    found = [record for i in range(count) for record in read_slice(FileSlice(file, i, count), Preprocess())]
    assert found == [SkippedRecord("null") if text is None else text for text in texts]


def test_a_line_longer_than_a_block_and_a_bad_one_far_into_a_file_are_placed(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x" * 3_000_000}), *[json.dumps({"text": f"{i}"}) for i in range(5000)], "{"]
    write(tmp_path, {"a.jsonl": "\n".join(lines)})
    records = all_records(Preprocess(data_files=f"{tmp_path}/*"), skip_bad=True)
    assert [len(str(record)) for record in records[:2]] == [3_000_000, 1] and len(records) == 5002
    bad = records[-1]
    assert isinstance(bad, DamagedRecord) and "a.jsonl:5002: not valid JSON" in bad.message


def parquet(path: Path, texts: list[str | None], group: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), path, row_group_size=group)


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    texts: list[str | None] = [f"text {i}" for i in range(30)]
    texts[4] = None
    parquet(tmp_path / "a.parquet", texts[:23], 5)
    parquet(tmp_path / "b.parquet", texts[23:], 4)
    expected = [SkippedRecord("null") if text is None else text for text in texts]
    for parts in (1, 2, 3, 7, 9):
        options = Preprocess(data_files=f"{tmp_path}/*.parquet", parts=parts, chunk_size=3)
        assert sorted(map(str, all_records(options))) == sorted(map(str, expected))
        assert all_records(options) == all_records(Preprocess(data_files=f"{tmp_path}/*.parquet")), "the same stream"
        check_entering_anywhere(open_source(options))


def test_parts_are_made_without_opening_a_file(tmp_path: Path) -> None:
    write(tmp_path, {f"{i:03d}.parquet": b"never opened" * 9999 for i in range(40)})
    assert len(open_source(Preprocess(data_files=f"{tmp_path}/*")).sizes) == 16


def test_text_of_a_parquet_file_that_is_not_utf_8_is_placed(tmp_path: Path) -> None:
    column = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(struct.pack("<4i", 0, 1, 3, 4)), pa.py_buffer(b"a\xff\xfeb")]
    )
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    records = all_records(Preprocess(data_files=f"{tmp_path}/*"), skip_bad=True)
    assert [records[0], records[2]] == ["a", "b"]
    assert (
        isinstance(records[1], DamagedRecord)
        and "a.parquet: row 1: byte 0 of the text is not valid utf-8" in records[1].message
    )


def test_a_parquet_column_that_is_missing_or_not_text_and_damage_are_named(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", ["x" * 500 + str(i) for i in range(500)], 100)
    files = f"{tmp_path}/a.parquet"
    with pytest.raises(BadInput, match=r"a.parquet: no column 'txt'.*did you mean 'text'"):
        all_records(Preprocess(data_files=files, text_column="txt"))
    with pytest.raises(BadInput, match=r"a.parquet: column 'id' holds int"):
        all_records(Preprocess(data_files=files, text_column="id"))
    raw = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(BadInput, match=r"a.parquet: damaged or truncated Parquet file"):
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
    for parts in (None, 2, 3):
        options = Preprocess(dataset=str(hub_folder), parts=parts)
        found = all_records(options)
        assert [text for text in found if isinstance(text, str)] == expected
        assert found.count(SkippedRecord("null")) == 3
        check_entering_anywhere(open_source(options))
    refused = [
        ({"text_column": "txt"}, "no column 'txt'.*did you mean 'text'"),
        ({"text_column": "id"}, "column 'id' holds int"),
        ({"split": "test"}, "train"),
        ({"set_name": "other"}, "other"),
    ]
    for change, message in refused:
        with pytest.raises(BadInput, match=message):
            all_records(Preprocess(**{"dataset": str(hub_folder), **change}))
    with pytest.raises(BadInput, match="nowhere"):
        all_records(Preprocess(dataset="./nowhere/at/all"))
    identity = open_source(Preprocess(dataset=str(hub_folder))).identity()
    parquet(hub_folder / "train-00000-of-00003.parquet", ["more"] * 50, 2)
    assert open_source(Preprocess(dataset=str(hub_folder))).identity() != identity
    for path in hub_folder.glob("*"):
        path.unlink()
    write(hub_folder, {"train.csv": "id,text\n1,one\n2,two\n"})
    assert all_records(Preprocess(dataset=str(hub_folder))) == ["one", "two"], "what only the library reads, it streams"


def test_what_is_said_where_the_hub_cannot_be_reached() -> None:
    from amlaunch.preprocess.sources.hub import hub_unreachable_message

    message = hub_unreachable_message(Preprocess(dataset="HuggingFaceFW/fineweb"), ConnectionError("no route"))
    for word in ("HuggingFaceFW/fineweb", "no route", "HF_HOME", "data_files", "DIR"):
        assert word in message


def test_json_is_read_as_lines_not_as_one_value(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": "\n".join(json.dumps({"text": f"l{i}\u2028x"}, ensure_ascii=False) for i in range(3))})
    assert all_records(Preprocess(data_files=f"{tmp_path}/*")) == [f"l{i}\u2028x" for i in range(3)]


json_like = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["text", "a", "\ud800"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(
    st.one_of(
        st.builds(
            lambda value, ascii_: json.dumps(value, ensure_ascii=ascii_).encode("utf-8", "surrogatepass"),
            json_like,
            st.booleans(),
        ),
        st.lists(
            st.sampled_from(
                [
                    b'{"text":',
                    b'"a',
                    b'"',
                    b"}",
                    b"{",
                    b",",
                    b"\\ud800",
                    b"\\udc00",
                    b"\xed\xa0\x80",
                    b"\xff",
                    b"\t",
                    b"\r",
                    b"\x00",
                    b"NaN",
                    b" ",
                    b"\xef\xbb\xbf",
                    b"1e999",
                ]
            ),
            max_size=9,
        ).map(b"".join),
    )
)
def test_json_lines_give_the_same_with_and_without_orjson(
    tmp_path_factory: pytest.TempPathFactory, line: bytes
) -> None:
    """The standard library accepts what orjson accepts, with the same result, and decides about what orjson rejects."""
    orjson = pytest.importorskip("orjson", reason="the extra fast is not installed")
    folder = tmp_path_factory.mktemp("json")
    (folder / "a.jsonl").write_bytes(b'{"text": "first"}\n' + line + b"\n")
    piece = FileSlice(open_files(Preprocess(data_files=f"{folder}/*")).files[0])
    found = list(read_slice(piece, Preprocess()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("amlaunch.preprocess.sources.readers.json_parser", lambda: json.loads)
        assert list(read_slice(piece, Preprocess())) == found
    assert found[0] == "first" and len(found) == 1 + bool(line.strip()) and json_parser() is orjson.loads


def test_two_objects_on_a_line_are_damage_not_two_documents(tmp_path: Path) -> None:
    """Also where an empty line makes the numbers agree."""
    write(tmp_path, {"a.jsonl": '{"text": "a"}{"text": "b"}\n\n{"text": "c"}\n'})
    bad, good = all_records(Preprocess(data_files=f"{tmp_path}/*"), skip_bad=True)
    assert isinstance(bad, DamagedRecord) and "a.jsonl:1: not valid JSON" in bad.message and good == "c"
