"""Read YAML as plain data with the line of every key, and with YAML 1.2's rules for scalars.

PyYAML follows YAML 1.1: ``1e-4`` is a string, ``on`` is true, and the last of two duplicate keys wins silently. A
recipe is read with PyYAML's parser and our own resolver (YAML 1.2.2, chapter 10.3, the core schema). PyYAML is imported
only where YAML is read or written: jobs read recipes as JSON, and an image may lack it.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from amlaunch.recipes.errors import BadInput

MAX_NODES = 100_000
MAX_DEPTH = 50
KeyPath = tuple[str, ...]

PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "merge", "value")
}
"""Tags that PyYAML's resolver gives to untagged nodes."""
MERGE_TAG = "tag:yaml.org,2002:merge"
"""Tag of a key ``<<`` without quotes (yaml.org/type/merge.html)."""
_CONSTANTS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_CONSTANTS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")

LINE_BREAKS = frozenset("\n\r\x85\u2028\u2029")
"""Characters that YAML 1.1, which PyYAML writes, folds in unquoted text."""


def scalar(text: str) -> Any:
    """Return the value of a plain (unquoted) scalar: None, bool, int, float or the text itself."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        return int(text) if len(text) < 100 else float(text)
    if _OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INF.fullmatch(text):
        return float("-inf" if text.startswith("-") else "inf")
    if _NAN.fullmatch(text):
        return float("nan")
    return text


class _Reader:
    """Turn PyYAML's composed nodes into plain data, and record the line of every key."""

    def __init__(self, source: str):
        self.source = source
        self.lines: dict[KeyPath, str] = {}
        self.open_nodes: set[int] = set()
        self.count = 0

    def position(self, node: Any) -> str:
        return f"{self.source}:{node.start_mark.line + 1}"

    def read(self, node: Any, path: KeyPath) -> Any:
        self.count += 1
        if self.count > MAX_NODES or len(self.open_nodes) > MAX_DEPTH or id(node) in self.open_nodes:
            raise BadInput(
                f"{self.position(node)}: an alias contains itself, the file expands to over {MAX_NODES:,} values, "
                f"or nesting exceeds {MAX_DEPTH} levels; write the values out"
            )
        if node.tag not in PLAIN_TAGS:
            raise BadInput(
                f"{self.position(node)}: the tag {node.tag} is not allowed, because a recipe is plain data; remove it"
            )

        self.lines.setdefault(path, self.position(node))
        self.open_nodes.add(id(node))
        try:
            if node.id == "mapping":
                return self.mapping(node, path)
            if node.id == "sequence":
                return [self.read(child, (*path, str(i))) for i, child in enumerate(node.value)]
            is_quoted = bool(node.style)
            return node.value if is_quoted else scalar(node.value)
        finally:
            self.open_nodes.discard(id(node))

    def mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged_nodes: list[Any] = []
        for key_node, value_node in node.value:
            if key_node.tag == MERGE_TAG:
                merged_nodes += value_node.value if value_node.id == "sequence" else [value_node]
                continue
            if key_node.id != "scalar":
                raise BadInput(f"{self.position(key_node)}: a key must be a plain word, not a list or a section")
            key = str(key_node.value)
            key_path = (*path, key)
            if key in values:
                raise BadInput(
                    f"{self.position(key_node)}: {'.'.join(key_path)} is set twice; first at {self.lines[key_path]}"
                )
            self.lines.setdefault(key_path, self.position(key_node))
            values[key] = self.read(value_node, key_path)
        return {**self.merged(merged_nodes, path), **values}

    def merged(self, nodes: list[Any], path: KeyPath) -> dict[str, Any]:
        """Return the keys of the sections that ``<<`` names; the first section that has a key sets it."""
        values: dict[str, Any] = {}
        for node in nodes:
            if node.id != "mapping":
                raise BadInput(
                    f"{self.position(node)}: <<: expected a section or a list of sections (<<: *name), got "
                    f"{node.value if node.id == 'scalar' else 'a list'}"
                )
            values = {**self.read(node, path), **values}
        return values


def parse(text: str, source: str) -> tuple[Any, dict[KeyPath, str]]:
    """Return ``text`` as plain data, and ``{key path: "source:line"}``.

    Raises BadInput with the line for YAML that does not parse, a duplicate key, a tag, or a second document.
    """
    # Imported here because an image may lack it, and because it slows down every start.
    import yaml

    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise BadInput(f"{source}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{source}: not valid YAML: {error}") from None
    except RecursionError:
        raise BadInput(f"{source}: nested too deeply") from None
    reader = _Reader(source)
    return (reader.read(node, ()) if node is not None else None), reader.lines


def parse_value(text: str, source: str) -> Any:
    """Parse one value of the command line: JSON, a YAML list, section or quoted text, else a plain scalar.

    Only text that begins like a list, a section or a quoted text is parsed, so that ``*.bin`` is a glob and not an
    alias.
    """
    if text.lstrip().startswith(("[", "{", '"', "'")):
        try:
            return parse_json(text)
        except ValueError:
            return parse(text, source)[0]
    return scalar(text.strip()) if "\n" not in text else text


def parse_json(text: str) -> Any:
    """Parse strict JSON. Raises ValueError for anything else: duplicate keys, NaN, deep nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a key is set twice")
        return values

    def refuse_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_file(path: Path) -> tuple[Any, dict[KeyPath, str]]:
    """Return the data of a YAML or ``.json`` file, and ``{key path: "file:line"}`` (of JSON, only the file).

    Raises BadInput if the file cannot be read, is not UTF-8, or does not parse.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start})") from None
    if path.suffix != ".json":
        return parse(text, str(path))
    try:
        return json.loads(text), {(): str(path)}
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON: {error}") from None


@cache
def _dumper() -> Any:
    """Return PyYAML's dumper, made to quote what our reader would not read back as the same string."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        is_plain = isinstance(scalar(text), str) and not LINE_BREAKS & set(text)
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if is_plain else '"')

    Dumper.add_representer(str, represent_text)
    return Dumper


def dump(value: Any) -> str:
    """Return plain data as YAML that :func:`parse` reads back to the same values."""
    import yaml

    return str(yaml.dump(value, Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=110))
