"""Change any key of a recipe from the command line: ``--a.b value`` and ``--a.b=value``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.yaml_reader import KeyPath, parse_value
from amlaunch.recipes.output import counted


def parse_overrides(argv: Sequence[str]) -> list[tuple[KeyPath, Any, str]]:
    """Return ``(key path, value, text as typed)`` for every override in ``argv``.

    A value is the next argument unless it starts with ``--``: in ``--lr -1`` it is a value, in ``--wandb --seed 3``
    the first key lacks one. Raises BadInput.
    """
    overrides = []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise BadInput(f"unexpected argument {argument!r}; write overrides as --section.key VALUE")
        key, equals, text = argument[2:].partition("=")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise BadInput(f"--{key} has no value; write --{key} VALUE (or --{key}=true)")
            text = remaining.pop(0)

        # The keys of `sweep` contain dots themselves.
        path = tuple(key.split(".", 1)) if key.startswith("sweep.") else tuple(key.split("."))
        if not all(path):
            raise BadInput(f"--{key}: an empty name in the key; write overrides as --section.key VALUE")
        typed = f"--{key}={text}"
        if path[0] == "sweep" and equals and len(path) == 2 and text[:1] + text[-1:] == "[]":
            typed = f"--sweep {path[1]}={text[1:-1]}"
        overrides.append((path, parse_value(text, typed), typed))
    return overrides


def apply_override(tree: dict[str, Any], path: KeyPath, value: Any, typed: str) -> None:
    """Set ``path`` in ``tree``, in place; missing sections are created, list items must exist.

    The schema checks later that the key exists. Raises BadInput that begins with ``typed``.
    """
    node: Any = tree
    for depth, key in enumerate(path[:-1]):
        node = _child(node, key, path[: depth + 1], typed)
    if isinstance(node, list):
        node[_index(node, path[-1], path, typed)] = value
    elif path[-1].isdigit():
        parent = ".".join(path[:-1])
        raise BadInput(f"{typed}: {parent} is not set, so it has no items; set the entire list: --{parent} '[…]'")
    else:
        node[path[-1]] = value


def _child(node: Any, key: str, path: KeyPath, typed: str) -> Any:
    if isinstance(node, list):
        return node[_index(node, key, path, typed)]
    child = node.get(key)
    if child is None:
        child = node[key] = {}
    if not isinstance(child, (dict, list)):
        raise BadInput(f"{typed}: {'.'.join(path)} is {child!r}, which has no keys")
    return child


def _index(node: list[Any], key: str, path: KeyPath, typed: str) -> int:
    if key.isdigit() and int(key) < len(node):
        return int(key)
    parent = ".".join(path[:-1])
    if not node:
        raise BadInput(f"{typed}: {parent} is an empty list; set the entire list: --{parent} '[…]'")
    raise BadInput(f"{typed}: {parent} has {counted(len(node), 'item')}; write an index from 0 to {len(node) - 1}")
