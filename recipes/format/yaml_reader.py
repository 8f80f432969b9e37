"""YAML as data, with the line of every key, and YAML 1.2's idea of a scalar.

PyYAML follows YAML 1.1: ``1e-4`` is a string, ``on`` is true, a duplicate key
wins silently. A recipe is read with PyYAML's parser and our own resolver
(YAML 1.2.2, chapter 10.3, the core schema).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from amlaunch.recipes.errors import BadInput

MAX_NODES = 100_000
MAX_DEPTH = 50
KeyPath = tuple[str, ...]

PLAIN_TAGS = {
    f"tag:yaml.org,2002:{kind}"
    for kind in ("null", "bool", "int", "float", "str", "seq", "map", "timestamp", "merge", "value")
}
"""What PyYAML's resolver gives to untagged nodes."""
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= dict.fromkeys(("true", "True", "TRUE"), True) | dict.fromkeys(("false", "False", "FALSE"), False)
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")


def scalar(text: str) -> Any:
    """The value of a plain (unquoted) scalar: None, bool, int, float or the text itself."""
    if text in _WORDS:
        return _WORDS[text]
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
    """Turns composed nodes into plain data and notes the line of every path."""

    def __init__(self, source: str):
        self.source = source
        self.lines: dict[KeyPath, str] = {}
        self.open: set[int] = set()
        self.count = 0

    def where(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}"

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        if self.count > MAX_NODES or len(self.open) > MAX_DEPTH or id(node) in self.open:
            raise BadInput(
                f"{self.where(node)}: aliases that refer to themselves or grow without end, or too deeply nested"
            )
        if node.tag not in PLAIN_TAGS:
            raise BadInput(f"{self.where(node)}: the tag {node.tag} is not allowed; a recipe is plain data")
        self.lines.setdefault(path, self.where(node))
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.read(child, (*path, str(i))) for i, child in enumerate(node.value)]
            assert isinstance(node, yaml.ScalarNode)  # there are only three kinds
            return node.value if node.style else scalar(node.value)
        finally:
            self.open.discard(id(node))

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise BadInput(f"{self.where(key_node)}: a key must be a plain word")
            key = str(key_node.value)
            here = (*path, key)
            if key in values:
                raise BadInput(f"{self.where(key_node)}: {'.'.join(here)} is given twice; first at {self.lines[here]}")
            self.lines[here] = self.where(key_node)
            values[key] = self.read(value_node, here)
        return values


def parse(text: str, source: str) -> tuple[Any, dict[KeyPath, str]]:
    """``text`` as plain data, and ``{key path: "source:line"}``.

    Raises BadInput (with the line) for YAML that does not parse, a duplicate
    key, a tag, or more than one document.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise BadInput(f"{source}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise BadInput(f"{source}: not valid YAML: {error}") from None
    except RecursionError:
        raise BadInput(f"{source}: too deeply nested") from None
    reader = _Reader(source)
    return (reader.read(node, ()) if node is not None else None), reader.lines


def parse_value(text: str, source: str) -> Any:
    """One value of the command line: a list, a section, or quoted text as YAML writes them, else a plain scalar.

    Only these are parsed, so that ``*.bin`` is a glob and not an alias.
    """
    if text.lstrip().startswith(("[", "{", '"', "'")):
        return parse(text, source)[0]
    return scalar(text.strip()) if "\n" not in text else text


def read_file(path: Path) -> tuple[Any, dict[KeyPath, str]]:
    """:func:`parse` of a file. BadInput where it cannot be read or is not UTF-8."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start})") from None
    return parse(text, str(path))


LINE_BREAKS = frozenset("\n\r\x85\u2028\u2029")
"""YAML 1.1, which PyYAML writes, folds all of them in plain text."""


class _Dumper(yaml.SafeDumper):
    """Quotes what our reader would not read back as the same string."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    plain = isinstance(scalar(text), str) and not LINE_BREAKS & set(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')


_Dumper.add_representer(str, _represent_str)


def dump(value: Any) -> str:
    """Plain data as YAML that :func:`parse` reads back to the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
