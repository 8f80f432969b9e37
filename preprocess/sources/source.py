"""A source of documents, cut into parts; each part is a stream of records that can be entered anywhere.

The parts depend only on the source and the recipe, never on who reads them: elements and workers take entire parts, so
their numbers do not change the output. A record is a document, or the reason why there is none. All records count: the
count is a part's cursor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from amlaunch.preprocess.sources.records import Record
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Preprocess
from amlaunch.recipes.format.targets import TargetPolicy


class Source(Protocol):
    """A source cut into parts."""

    @property
    def sizes(self) -> Sequence[int]:
        """Stored bytes of each part: an estimate of its work."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return a description that is equal as long as the parts hold the same documents."""
        ...

    def records(self, part: int, skip: int) -> Iterator[Record]:
        """Yield the records of a part in their fixed order, without the first ``skip``."""
        ...


def open_source(options: Preprocess, policy: TargetPolicy | None = None) -> Source:
    """Open the source that ``options`` name.

    Raises BadInput if nothing matches or the options conflict, ExternalFailure if a remote source cannot be reached.
    """
    names = [name for name in ("dataset", "data_files", "source") if getattr(options, name)]
    if len(names) != 1:
        raise BadInput(
            f"preprocess: set exactly one of dataset (Hugging Face name or folder), data_files (globs of local files) "
            f"and source (your own iterator, by _target_); got {' and '.join(names) or 'none'}"
        )

    if options.data_files:
        from amlaunch.preprocess.sources.local_files import open_files

        return open_files(options)
    if options.dataset:
        from amlaunch.preprocess.sources.hub import open_dataset

        return open_dataset(options)
    from amlaunch.preprocess.sources.user_iterator import open_iterator

    return open_iterator(options, policy or TargetPolicy())
