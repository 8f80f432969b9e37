"""Expand ``${VAR}`` and ``${VAR:-default}`` when a job starts; stored recipes keep the placeholder.

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


class UnsetVariable(Exception):
    """A placeholder's variable has no value and no default; ``name`` is the variable."""

    def __init__(self, name: str, known: Mapping[str, str]):
        super().__init__(f"the variable {name} is {'empty' if name in known else 'not set'}")
        self.name = name


def variables() -> Mapping[str, str]:
    """Return the environment, plus ``PYTHON_STDLIB``: the folder of the running Python's standard library."""
    return {"PYTHON_STDLIB": sysconfig.get_path("stdlib"), **os.environ}


def has_placeholder(value: Any) -> bool:
    """Return True if ``value`` is text with a ``${…}`` in it."""
    return isinstance(value, str) and PLACEHOLDER.search(value) is not None


def expand(value: Any, known: Mapping[str, str]) -> Any:
    """Return ``value`` with its placeholders expanded; text that is one placeholder is read as a YAML scalar.

    Raises UnsetVariable.
    """
    if not isinstance(value, str):
        return value
    text = expand_text(value, known)
    return scalar(text) if PLACEHOLDER.fullmatch(value) else text


def expand_text(value: str, known: Mapping[str, str]) -> str:
    """Return ``value`` with its placeholders expanded, as text: a variable's ``007`` does not become a number.

    As in a shell, an empty variable takes the default. Without a default it expands to nothing, except before a
    slash: the path would become one below the root. Raises UnsetVariable.
    """

    def fill(match: re.Match[str]) -> str:
        name, default = match.groups()
        if known.get(name):
            return known[name]
        if default is not None:
            return default
        if name in known and not value.startswith("/", match.end()):
            return ""
        raise UnsetVariable(name, known)

    return PLACEHOLDER.sub(fill, value)


def expand_known(value: Any, known: Mapping[str, str]) -> Any:
    """Expand placeholders through mappings and lists; those without a value stay as they are."""
    if isinstance(value, dict):
        return {key: expand_known(child, known) for key, child in value.items()}
    if isinstance(value, list):
        return [expand_known(child, known) for child in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        name, default = match.groups()
        return str(known.get(name) or (match[0] if default is None else default))

    return PLACEHOLDER.sub(fill, value)
