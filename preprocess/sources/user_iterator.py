"""A user's own iterator as a source."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from amlaunch.preprocess.sources.records import DamagedRecord, Record, SkippedRecord
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import fingerprint
from amlaunch.recipes.format.schema import Preprocess
from amlaunch.recipes.format.targets import TargetPolicy, build, code_digest, resolve, split_target

UNKNOWN_BYTES = 1 << 40
"""Assumed size of a part whose size is unknown."""


@dataclass(frozen=True)
class UserIterator:
    """The callable of ``preprocess.source``: called once per part, it yields the part's documents in a fixed order.

    A document is text, None (counted as ``null``), or a mapping with the text column.
    """

    options: Preprocess
    policy: TargetPolicy

    @property
    def sizes(self) -> list[int]:
        """Bytes of each part; all parts are assumed equal."""
        return [UNKNOWN_BYTES] * (self.options.parts or 1)

    def identity(self) -> dict[str, Any]:
        """Describe the iterator: its entry in the recipe, and a digest of its code if that is a file of the user's."""
        node = self.options.source or {}
        is_user_file = bool(split_target(node["_target_"])[0])
        code = code_digest(node["_target_"], self.policy) if is_user_file else ""
        return {"kind": "iterator", "source": node, "code": fingerprint(code), "text_column": self.options.text_column}

    def records(self, part: int, skip: int) -> Iterator[Record]:
        """Yield the records of a part without the first ``skip``.

        An exception of the iterator becomes BadInput with the document's number.
        """
        node = self.options.source or {}
        target = node["_target_"]
        keywords = {"part": part, "parts": len(self.sizes)} if accepts_parts(resolve(target, self.policy)) else {}
        number = skip
        try:
            values = islice(build(node, self.policy, **keywords), skip, None)
            for number, value in enumerate(values, skip):
                yield to_record(value, self.options.text_column, f"{target}: document {number} of part {part}")
        except (BadInput, OSError):
            raise
        except Exception as error:
            raise BadInput(
                f"{target}: after document {number} of part {part}: {type(error).__name__}: {error}"
            ) from error


def open_iterator(options: Preprocess, policy: TargetPolicy) -> UserIterator:
    """Open the iterator of ``options.source``. Raises BadInput if it cannot be cut into the requested parts."""
    name = str((options.source or {}).get("_target_"))
    target = resolve(name, policy)
    if options.parts and options.parts > 1 and not accepts_parts(target):
        raise BadInput(
            f"preprocess.parts: {options.parts}, but {name} has no parameters part and parts, so it cannot yield one "
            f"part alone. Add these two keyword parameters, or set preprocess.parts: 1"
        )
    return UserIterator(options, policy)


def accepts_parts(target: Any) -> bool:
    """Return True if a callable has the parameters ``part`` and ``parts``."""
    return {"part", "parts"} <= set(inspect.signature(target).parameters)


def to_record(value: Any, column: str, location: str) -> Record:
    """Convert a value that the iterator yielded to a record."""
    if isinstance(value, Mapping):
        if column not in value:
            return DamagedRecord("no column", f"{location}: no column {column!r} (preprocess.text_column)")
        value = value[column]
    if value is None:
        return SkippedRecord("null")
    if not isinstance(value, str):
        return DamagedRecord("not text", f"{location}: {type(value).__name__}, not text")
    return value
