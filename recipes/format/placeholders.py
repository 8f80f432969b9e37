"""``${VAR}`` and ``${VAR:-default}``: filled in when a job starts, kept as they stand in what is stored.

So a secret in the environment reaches the process that needs it and no file.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Mapping
from typing import Any

from amlaunch.recipes.format.yaml_reader import scalar

PLACEHOLDER = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class Unset(Exception):
    """A variable without a value and without a default; its text says so."""

    def __init__(self, name: str, known: Mapping[str, str]):
        super().__init__(f"the variable {name} is {'empty' if name in known else 'not set'}")
        self.name = name


def variables() -> Mapping[str, str]:
    """The environment, and ``PYTHON_STDLIB``: the folder of the running Python's standard library."""
    return {"PYTHON_STDLIB": sysconfig.get_path("stdlib"), **os.environ}


def has_placeholder(value: Any) -> bool:
    """Whether ``value`` is text with a ``${…}`` in it."""
    return isinstance(value, str) and PLACEHOLDER.search(value) is not None


def expand(value: Any, known: Mapping[str, str]) -> Any:
    """``value`` with its placeholders filled in; text that is one placeholder is read as a YAML scalar. Raises Unset."""
    if not isinstance(value, str):
        return value
    text = expand_text(value, known)
    return scalar(text) if PLACEHOLDER.fullmatch(value) else text


def expand_text(value: str, known: Mapping[str, str]) -> str:
    """``value`` with its placeholders filled in, to the letter: ``007`` of a variable is no number. Raises Unset.

    As in a shell, an empty variable takes the default too; without one it is nothing, but never the folder
    before a slash, which would be the root of the machine.
    """

    def fill(match: re.Match[str]) -> str:
        name, default = match.groups()
        if known.get(name):
            return known[name]
        if default is None:
            if name in known and not value.startswith("/", match.end()):
                return ""
            raise Unset(name, known)
        return default

    return PLACEHOLDER.sub(fill, value)


def expand_known(value: Any, known: Mapping[str, str]) -> Any:
    """:func:`expand` through mappings and lists; what has no value stays as it stands."""
    if isinstance(value, dict):
        return {key: expand_known(child, known) for key, child in value.items()}
    if isinstance(value, list):
        return [expand_known(child, known) for child in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        return str(known.get(match[1]) or (match[0] if match[2] is None else match[2]))

    return PLACEHOLDER.sub(fill, value)
