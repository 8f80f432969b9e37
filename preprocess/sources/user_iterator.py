"""A user's own iterator as a source."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from amlaunch.preprocess.sources.records import Bad, Record, Skipped
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import fingerprint
from amlaunch.recipes.format.schema import Preprocess
from amlaunch.recipes.format.targets import Policy, build, code_digest, resolve, split_target

UNKNOWN_BYTES = 1 << 40
"""What a part is taken to hold where nobody knows."""


@dataclass(frozen=True)
class UserIterator:
    """What ``preprocess.source`` names: called once for each part, it gives that part's documents in a fixed order.

    A document is text, None (counted as ``null``), or a mapping with the text column.
    """

    options: Preprocess
    policy: Policy

    @property
    def sizes(self) -> list[int]:
        """All parts are taken to be equal."""
        return [UNKNOWN_BYTES] * (self.options.parts or 1)

    def identity(self) -> dict[str, Any]:
        """The recipe's words for it, and its code where that is a file of the user's."""
        node = self.options.source or {}
        code = code_digest(node["_target_"], self.policy) if split_target(node["_target_"])[0] else ""
        return {"kind": "iterator", "source": node, "code": fingerprint(code), "text_column": self.options.text_column}

    def records(self, part: int, skip: int) -> Iterator[Record]:
        """The records of a part without the first ``skip``. What the iterator raises is BadInput, with the document's number."""
        node = self.options.source or {}
        own = {"part": part, "parts": len(self.sizes)} if takes_parts(resolve(node["_target_"], self.policy)) else {}
        number = skip
        try:
            for number, value in enumerate(islice(build(node, self.policy, **own), skip, None), skip):
                yield record(value, self.options.text_column, f"{node['_target_']}: document {number} of part {part}")
        except (BadInput, OSError):
            raise
        except Exception as error:
            where = f"{node['_target_']}: behind document {number} of part {part}"
            raise BadInput(f"{where}: {type(error).__name__}: {error}") from error


def open_iterator(options: Preprocess, policy: Policy) -> UserIterator:
    """The iterator of ``options.source``. Raises BadInput for parts that it cannot be divided into."""
    target = resolve(str((options.source or {}).get("_target_")), policy)
    if options.parts and options.parts > 1 and not takes_parts(target):
        raise BadInput(
            f"preprocess.parts: {options.parts}, but {(options.source or {})['_target_']} cannot give a part alone: "
            f"let it take the keywords part and parts, or write parts: 1"
        )
    return UserIterator(options, policy)


def takes_parts(target: Any) -> bool:
    """Whether a callable has parameters ``part`` and ``parts``."""
    return {"part", "parts"} <= set(inspect.signature(target).parameters)


def record(value: Any, column: str, where: str) -> Record:
    """What an iterator gave as a record."""
    if isinstance(value, Mapping):
        if column not in value:
            return Bad("no column", f"{where}: no column {column!r} (preprocess.text_column)")
        value = value[column]
    if value is None:
        return Skipped("null")
    return value if isinstance(value, str) else Bad("not text", f"{where}: {type(value).__name__}, not text")
