"""Where documents come from: one element's part of a source, as a stream that can be entered anywhere.

A record is a document, or a place where one is missing for a known reason.
Records are counted, also the missing ones: the count is the stream's cursor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from recipes.errors import BadInput
from recipes.schema import Preprocess


@dataclass(frozen=True)
class Skipped:
    """A record without a document: ``null``, ``undecodable``, …"""

    reason: str


Record = str | Skipped
"""A document's text, or why there is none."""


class Source(Protocol):
    """One element's part of a source."""

    def identity(self) -> dict[str, Any]:
        """What the whole source is: equal for all elements, and as long as it would give the same documents."""
        ...

    def records(self, skip: int) -> Iterator[Record]:
        """The records of this part, in their fixed order, without the first ``skip``."""
        ...


def open_source(options: Preprocess, index: int) -> Source:
    """The part of ``options``' source that element ``index`` reads.

    Raises BadInput where nothing matches, or there is less to share than
    elements; Failure where a remote source cannot be reached.
    """
    if not 0 <= index < options.elements:
        raise BadInput(
            f"--index {index}: preprocess.elements is {options.elements}, so it goes from 0 to {options.elements - 1}"
        )
    if options.dataset and options.data_files:
        raise BadInput("preprocess: give either dataset (Hugging Face) or data_files (local files), not both")
    if options.data_files:
        from preprocess.local import open_files

        return open_files(options, index)
    if options.dataset:
        from preprocess.hub import open_dataset

        return open_dataset(options, index)
    raise BadInput("preprocess: give dataset (a Hugging Face name) or data_files (globs of local files)")
