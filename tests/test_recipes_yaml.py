"""YAML as recipes read it: YAML 1.2 scalars, duplicate keys, lines, and a dump that reads back unchanged."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.overrides import apply_override, parse_overrides
from amlaunch.recipes.format.yaml_reader import dump, parse, parse_value, scalar


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("5", 5),
        ("-7", -7),
        ("+3", 3),
        ("0o17", 15),
        ("0x1F", 31),
        (".5", 0.5),
        ("1.", 1.0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        # YAML 1.1 reads these otherwise
        ("on", "on"),
        ("yes", "yes"),
        ("no", "no"),
        ("010", 10),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("none", "none"),
    ],
)
def test_scalars_follow_yaml_1_2(text, value):
    result = scalar(text)
    assert result == value and type(result) is type(value)


def test_quotes_keep_a_string():
    assert parse("a: \"123\"\nb: '1e-4'\nc: 1e-4\n", "r")[0] == {"a": "123", "b": "1e-4", "c": 1e-4}
    assert parse_value('"123"', "--x") == "123"
    assert parse_value("[1e-4, two]", "--x") == [1e-4, "two"]
    assert parse_value("data/*.bin", "--x") == "data/*.bin" and parse_value("*.bin", "--x") == "*.bin"


@pytest.mark.parametrize(
    ("text", "line", "expected"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, "set twice"),
        ("a:\n  x: 1\n  x: 2\n", 3, "a.x is set twice; first at r:2"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "not allowed"),
        ("a: [1, 2\nb: 3\n", 2, "not valid YAML"),
        ("a: 1\n---\nb: 2\n", 2, "not valid YAML"),
        ("? [1, 2]\n: x\n", 1, "plain word"),
        ("a: &x [*x]\n", 1, "an alias contains itself"),
    ],
)
def test_bad_yaml_names_its_line(text, line, expected):
    with pytest.raises(BadInput, match=f"r:{line}: .*{expected}"):
        parse(text, "r")


@pytest.mark.parametrize("text", ["a: " + "[" * 3000, "a: " + "{b: " * 3000, "a: " + "[" * 60 + "]" * 60])
def test_deep_nesting_is_refused(text):
    with pytest.raises(BadInput):
        parse(text, "r")


def test_merge_keys_fill_in_what_a_section_does_not_set():
    text = (
        "x: &x {a: 1, b: 2, n: {m: 1}}\ny: &y {b: 3,\n  c: 4}\nz:\n  a: 5\n  <<: [*x, *y]\nw: {<<: *y}\nq: {'<<': 1}\n"
    )
    data, lines = parse(text, "r")
    assert data["z"] == {"a": 5, "b": 2, "c": 4, "n": {"m": 1}} and data["w"] == {"b": 3, "c": 4}
    assert data["q"] == {"<<": 1} == parse(dump(data), "r")[0]["q"]
    assert lines["z", "a"] == "r:5" and lines["z", "b"] == "r:1" and lines["z", "c"] == "r:3"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: {<<: 3}", "r:1: <<: expected a section or a list of sections (<<: *name), got 3"),
        ("a: {<<: [{b: 1}, x]}", "got x"),
        ("a: &x {<<: *x}", "an alias contains itself"),
    ],
)
def test_a_merge_of_anything_but_sections_is_refused(text, expected):
    with pytest.raises(BadInput) as caught:
        parse(text, "r")
    assert expected in str(caught.value)


def test_growing_aliases_are_refused():
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{name}: &{name} [{','.join('*' + before for _ in range(10))}]\n"
        for before, name in zip("abcdef", "bcdefg", strict=True)
    )
    with pytest.raises(BadInput, match="expands to over 100,000 values"):
        parse(bomb, "r")


def test_every_path_has_its_line():
    _, lines = parse("a:\n  b: 1\n  c:\n    - 2\n    - d: 3\n", "r.yaml")
    assert lines[("a", "b")] == "r.yaml:2" and lines[("a", "c", "1", "d")] == "r.yaml:5"


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from([1e-5, -1e-300, 1e22])
    | st.text()
)
TREES = st.recursive(
    SCALARS,
    lambda child: (
        st.lists(child, max_size=3)
        | st.dictionaries(st.text(st.characters(categories=["L", "N"]), min_size=1), child, max_size=3)
    ),
    max_leaves=12,
)


@given(TREES)
def test_a_dump_reads_back_the_same(value):
    """A string that looks like a number must come back as a string: the run stores its recipe this way."""
    try:
        "".join(_strings(value)).encode()
    except UnicodeEncodeError:
        return  # not text that a file can hold
    text = dump({"x": value, "list": [value, {"nested": value}]})
    result = parse(text, "r")[0]
    assert repr(result) == repr({"x": value, "list": [value, {"nested": value}]})
    # Older versions, and other tools, read it by the rules of YAML 1.1.
    assert yaml.safe_load(dump({"x": value})) == {"x": value}


def _strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield key
            yield from _strings(child)
    elif isinstance(value, list):
        for child in value:
            yield from _strings(child)


def test_overrides_in_both_spellings():
    overrides = parse_overrides(
        ["--model.n_layer", "6", "--optimizer.lr=1e-4", "--wandb", "null", "--optimizer.betas.0", "-1", "--name=a=b"]
    )
    assert [(path, value) for path, value, _ in overrides] == [
        (("model", "n_layer"), 6),
        (("optimizer", "lr"), 1e-4),
        (("wandb",), None),
        (("optimizer", "betas", "0"), -1),
        (("name",), "a=b"),
    ]


def test_an_override_changes_list_items_and_creates_sections():
    tree = {"optimizer": {"betas": [0.9, 0.95]}, "wandb": None}
    apply_override(tree, ("optimizer", "betas", "0"), 0.8, "x")
    apply_override(tree, ("wandb", "project"), "p", "x")
    assert tree == {"optimizer": {"betas": [0.8, 0.95]}, "wandb": {"project": "p"}}


@pytest.mark.parametrize("tokens", [["--a"], ["--a", "--b", "1"], ["stray"], ["--a..b", "1"], ["--", "x"]])
def test_a_malformed_override_is_refused(tokens):
    with pytest.raises(BadInput):
        parse_overrides(tokens)


@pytest.mark.parametrize("path", [("betas", "2"), ("betas", "x"), ("lr", "x")])
def test_an_override_of_a_missing_item_is_refused(path):
    with pytest.raises(BadInput):
        apply_override({"betas": [1, 2], "lr": 3}, path, 1, "--x")
