"""Hugging Face datasets as a source.

The library ``datasets`` says which files a dataset, set and split are, at which
commit. Parquet and JSON-lines files are then read as local ones are: by parts,
one column, from where they lie (:mod:`amlaunch.preprocess.sources.remote_file`), or downloaded first.
What else ``datasets`` can read, it streams itself, one part a file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amlaunch.preprocess.errors import Failure
from amlaunch.preprocess.sources.file_parts import JSON_LINES, File, Slice, cut
from amlaunch.preprocess.sources.local_files import LocalFile, records_of
from amlaunch.preprocess.sources.readers import no_column
from amlaunch.preprocess.sources.records import Bad, Record, Skipped
from amlaunch.preprocess.sources.remote_file import RemoteFile
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Preprocess

UNKNOWN_BYTES = 1 << 40
HUB = "hf://datasets/"


@dataclass(frozen=True)
class DatasetFiles:
    """A dataset whose files we read ourselves."""

    options: Preprocess
    files: tuple[File, ...]
    parts: tuple[tuple[Slice, ...], ...]

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each part."""
        return [sum(piece.end - piece.begin for piece in part) for part in self.parts]

    def identity(self) -> dict[str, Any]:
        """Which dataset, and the names (of the hub with the commit) and sizes of its files."""
        listing = "".join(f"{file.name}\0{file.size}\n" for file in self.files)
        digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        return {**names(self.options), "files": len(self.files), "digest": digest}

    def records(self, part: int, skip: int) -> Iterator[Record]:
        """The records of a part without the first ``skip``. Raises Failure where the hub stops answering."""
        return records_of(self.parts[part], self.options, skip)


@dataclass(frozen=True)
class StreamedDataset:
    """A dataset in a format that only ``datasets`` reads."""

    options: Preprocess
    stream: Any
    """``datasets.IterableDataset``"""

    @property
    def sizes(self) -> Sequence[int]:
        """A part is a file; nobody says how large."""
        return [UNKNOWN_BYTES] * int(self.stream.num_shards)

    def identity(self) -> dict[str, Any]:
        """Which dataset, and for a local folder the names and sizes of its files."""
        return {**names(self.options), **local_digest(str(self.options.dataset))}

    def records(self, part: int, skip: int) -> Iterator[Record]:
        """The rows of a part without the first ``skip``. Raises Failure where the hub stops answering."""
        column = self.options.text_column
        stream = self.stream.shard(num_shards=len(self.sizes), index=part)
        try:
            for number, row in enumerate(stream.skip(skip) if skip else stream, skip):
                yield self._record(row, column, f"dataset {self.options.dataset}: row {number} of part {part}")
        except ConnectionError as error:
            raise Failure(unreachable(self.options, error)) from None

    def _record(self, row: dict[str, Any], column: str, where: str) -> Record:
        if column not in row:
            raise BadInput(no_column(where, column, row))
        if row[column] is None:
            return Skipped("null")
        text = row[column]
        return (
            text
            if isinstance(text, str)
            else Bad("not text", f"{where}: column {column!r} holds {type(text).__name__}, not text")
        )


def names(options: Preprocess) -> dict[str, Any]:
    """What the recipe says of a dataset."""
    found = {
        "dataset": options.dataset,
        "set_name": options.set_name,
        "split": options.split,
        "text_column": options.text_column,
    }
    return {"kind": "dataset", **found, **({"revision": options.revision} if options.revision else {})}


def local_digest(dataset: str) -> dict[str, str]:
    """Stands for the files of a dataset that is a local folder; nothing for one on the hub."""
    folder = Path(dataset)
    if not folder.is_dir():
        return {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listing = "".join(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\n" for path in files)
    return {"digest": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()[:16]}


def open_dataset(options: Preprocess) -> DatasetFiles | StreamedDataset:
    """The dataset, cut into parts.

    Raises BadInput for a wrong name, set or split, and Failure where the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError:
        raise BadInput('preprocess.dataset: Hugging Face datasets need a package: pip install "amlaunch[hf]"') from None
    try:
        builder = datasets.load_dataset_builder(str(options.dataset), name=options.set_name, revision=options.revision)
        files = files_of(builder, options)
        if files:
            return DatasetFiles(options, tuple(files), tuple(cut(files, options)))
        return StreamedDataset(options, builder.as_streaming_dataset(split=options.split))
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        # wrong names of dataset, set or split; datasets says which there are
        raise BadInput(f"preprocess.dataset: {options.dataset}: {error}") from None
    except (OSError, RuntimeError) as error:  # huggingface_hub's and httpx' are of these kinds
        raise Failure(unreachable(options, error)) from None


def files_of(builder: Any, options: Preprocess) -> list[File]:
    """The files of a split, where all of them are of kinds that we read ourselves."""
    data_files = builder.config.data_files
    if not data_files or builder.name not in ("parquet", "json"):
        return []
    if options.split not in data_files:
        raise ValueError(f"no split {options.split!r}; it has {', '.join(map(str, data_files))}")
    paths = [str(path) for path in data_files[options.split]]
    if not all(path.endswith((".parquet", *JSON_LINES)) for path in paths):
        return []
    return [_hub_file(path, options) if path.startswith(HUB) else _local_file(path, options) for path in paths]


def _local_file(path: str, options: Preprocess) -> File:
    found = Path(path)
    folder = Path(str(options.dataset)).resolve()
    name = found.relative_to(folder).as_posix() if found.is_relative_to(folder) else found.name
    return LocalFile(found, name, found.stat().st_size)


def _hub_file(path: str, options: Preprocess) -> File:
    """``hf://datasets/OWNER/NAME@COMMIT/PATH`` as something to read."""
    from huggingface_hub import HfFileSystem, constants, get_token, hf_hub_url

    system = HfFileSystem()
    place: Any = system.resolve_path(path)
    url = hf_hub_url(
        place.repo_id, place.path_in_repo, repo_type="dataset", revision=place.revision, endpoint=constants.ENDPOINT
    )
    cache = Path(options.data_cache_dir).expanduser() if options.data_cache_dir else None
    kept = cache / f"{place.repo_id}@{place.revision}" / place.path_in_repo if cache else None
    return RemoteFile(url, f"{place.revision}/{place.path_in_repo}", int(system.info(path)["size"]), kept, get_token())


def unreachable(options: Preprocess, error: Exception) -> str:
    """What to do where there is no way to the hub."""
    return (
        f"preprocess.dataset: {options.dataset}: the Hugging Face hub cannot be reached from here ({error}). "
        f"Where jobs have no internet, download it once on a machine that has (hf download --repo-type dataset "
        f"{options.dataset} --local-dir DIR), and set preprocess.dataset to DIR, or preprocess.data_files to "
        f"DIR/**/*.parquet; or download with HF_HOME on the shared file system and export the same HF_HOME in the jobs"
    )
