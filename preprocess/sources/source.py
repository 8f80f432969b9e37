"""Where documents come from: a source cut into parts, each a stream of records that can be entered anywhere.

The parts are a function of the source and the recipe alone, never of who reads
them: elements and workers take whole parts, so their numbers change nothing in
the output. A record is a document, or a place where one is missing for a known
reason. Records are counted, also the missing ones: the count is a part's cursor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from amlaunch.preprocess.sources.records import Record
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Preprocess
from amlaunch.recipes.format.targets import Policy


class Source(Protocol):
    """A source cut into parts."""

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each part as stored: how much work it is, about."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the source is: equal as long as it would give the same documents in the same parts."""
        ...

    def records(self, part: int, skip: int) -> Iterator[Record]:
        """The records of a part in their fixed order, without the first ``skip``."""
        ...


def open_source(options: Preprocess, policy: Policy | None = None) -> Source:
    """The source that ``options`` name.

    Raises BadInput where nothing matches or the options do not fit; Failure
    where a remote source cannot be reached.
    """
    given = [name for name in ("dataset", "data_files", "source") if getattr(options, name)]
    if len(given) != 1:
        raise BadInput(
            "preprocess: give one of dataset (a Hugging Face name or folder), data_files (globs of local files) and "
            f"source (an iterator of yours, by _target_); given: {' and '.join(given) or 'none'}"
        )
    if options.data_files:
        from amlaunch.preprocess.sources.local_files import open_files

        return open_files(options)
    if options.dataset:
        from amlaunch.preprocess.sources.hub import open_dataset

        return open_dataset(options)
    from amlaunch.preprocess.sources.user_iterator import open_iterator

    return open_iterator(options, policy or Policy())
