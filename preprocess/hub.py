"""Hugging Face datasets as a source, streamed: nothing is downloaded but what is read."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preprocess.failure import Failure
from preprocess.readers import no_column, record
from preprocess.sources import Record
from recipes.errors import BadInput
from recipes.schema import Preprocess


@dataclass(frozen=True)
class HubDataset:
    """One element's shard of a streamed dataset."""

    options: Preprocess
    stream: Any
    """``datasets.IterableDataset``"""

    def identity(self) -> dict[str, Any]:
        """Which dataset, and for a local folder the names and sizes of its files."""
        o = self.options
        names = {"dataset": o.dataset, "set_name": o.set_name, "split": o.split, "text_column": o.text_column}
        return {"kind": "dataset", **names, **local_digest(str(o.dataset))}

    def records(self, skip: int) -> Iterator[Record]:
        """The rows of this shard without the first ``skip``. Raises Failure where the hub stops answering."""
        column = self.options.text_column
        where = f"dataset {self.options.dataset}"
        try:
            for row in self.stream.skip(skip) if skip else self.stream:
                if column not in row:
                    raise BadInput(no_column(where, column, row))
                yield record(where, column, row[column])
        except ConnectionError as error:
            raise Failure(unreachable(self.options, error)) from None


def local_digest(dataset: str) -> dict[str, str]:
    """Stands for the files of a dataset that is a local folder; nothing for one on the hub."""
    folder = Path(dataset)
    if not folder.is_dir():
        return {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = "".join(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\n" for path in files)
    return {"digest": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]}


def open_dataset(options: Preprocess, index: int) -> HubDataset:
    """Element ``index``'s shard of the dataset, the text column only.

    Raises BadInput for a wrong name, split, column or number of elements, and
    Failure where the hub cannot be reached.
    """
    stream = load_stream(options)
    if stream.column_names is not None and options.text_column not in stream.column_names:
        raise BadInput(no_column(f"dataset {options.dataset}", options.text_column, stream.column_names))
    if stream.column_names is not None:
        stream = stream.select_columns([options.text_column])
    if stream.num_shards < options.elements:
        raise BadInput(
            f"preprocess.elements: {options.elements} elements, but {options.dataset} has {stream.num_shards} files "
            f"to share between them: set it to at most {stream.num_shards}"
        )
    if options.elements > 1:
        stream = stream.shard(num_shards=options.elements, index=index)
    return HubDataset(options, stream)


def load_stream(options: Preprocess) -> Any:
    """The whole dataset as ``datasets.IterableDataset``."""
    try:
        import datasets
    except ImportError:
        raise BadInput('preprocess.dataset: Hugging Face datasets need a package: pip install "amlaunch[hf]"') from None
    try:
        return datasets.load_dataset(options.dataset, name=options.set_name, split=options.split, streaming=True)
    except ConnectionError as error:
        raise Failure(unreachable(options, error)) from None
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        # wrong names of dataset, set or split; datasets says which there are
        raise BadInput(f"preprocess.dataset: {options.dataset}: {error}") from None


def unreachable(options: Preprocess, error: Exception) -> str:
    """What to do where there is no way to the hub."""
    return (
        f"preprocess.dataset: {options.dataset}: the Hugging Face hub cannot be reached from here ({error}). "
        f"Where jobs have no internet, download it once on a machine that has (hf download --repo-type dataset "
        f"{options.dataset} --local-dir DIR), and set preprocess.dataset to DIR, or preprocess.data_files to "
        f"DIR/**/*.parquet; or download with HF_HOME on the shared file system and export the same HF_HOME in the jobs"
    )
