"""``--a.b value`` and ``--a.b=value``: any key of a recipe, from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.yaml_reader import KeyPath, parse_value


def parse_overrides(tokens: Sequence[str]) -> list[tuple[KeyPath, Any, str]]:
    """``(key path, value, what the user typed)`` for every override in ``tokens``.

    A value is the next token whatever it starts with, but for ``--``: ``--lr -1``
    is a value, ``--wandb --seed 3`` is a key that lost its value. Raises BadInput.
    """
    found = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            raise BadInput(f"unexpected argument {token!r}: an override is --section.key value")
        key, equals, text = token[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise BadInput(f"--{key} has no value: write --{key} VALUE (or --{key}=true)")
            text = rest.pop(0)
        path = tuple(key.split(".", 1)) if key.startswith("sweep.") else tuple(key.split("."))  # sweep's keys have dots
        if not all(path):
            raise BadInput(f"--{key}: an override is --section.key value")
        shown = f"--{key}={text}"
        found.append((path, parse_value(text, shown), shown))
    return found


def apply_override(tree: dict[str, Any], path: KeyPath, value: Any, shown: str) -> None:
    """Set ``path`` in ``tree``, in place; missing sections are made, list items must exist.

    Whether the key means anything is the schema's business, checked afterwards.
    """
    node: Any = tree
    for depth, key in enumerate(path[:-1]):
        node = _child(node, key, path[: depth + 1], shown)
    if isinstance(node, list):
        node[_index(node, path[-1], path, shown)] = value
    elif path[-1].isdigit():
        raise BadInput(
            f"{shown}: {'.'.join(path[:-1])} has no list yet; give the whole of it: --{'.'.join(path[:-1])} '[…]'"
        )
    else:
        node[path[-1]] = value


def _child(node: Any, key: str, path: KeyPath, shown: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, path, shown)]
    child = node.get(key)
    if child is None:
        child = node[key] = {}
    if not isinstance(child, (dict, list)):
        raise BadInput(f"{shown}: {'.'.join(path)} is {child!r}, it has no keys below it")
    return child


def _index(node: list[Any], key: str, path: KeyPath, shown: str) -> int:
    if key.isdigit() and int(key) < len(node):
        return int(key)
    raise BadInput(
        f"{shown}: {'.'.join(path[:-1])} is a list of {len(node)}; an item is a number from 0 to {len(node) - 1}"
    )
