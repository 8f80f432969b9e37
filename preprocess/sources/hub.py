"""Hugging Face datasets as a source.

The library ``datasets`` resolves a dataset, set and split to files at one commit. Parquet and JSON-lines files are then
read like local ones: by parts, one column, by byte range from the hub
(:mod:`amlaunch.preprocess.sources.remote_file`) or downloaded first. ``datasets`` itself streams other formats, one
part per file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amlaunch.preprocess.errors import ExternalFailure
from amlaunch.preprocess.sources.file_parts import JSON_LINES_SUFFIXES, FileSlice, SourceFile, cut_into_parts
from amlaunch.preprocess.sources.local_files import LocalFile, listing_digest, read_records
from amlaunch.preprocess.sources.readers import missing_column_message
from amlaunch.preprocess.sources.records import DamagedRecord, Record, SkippedRecord
from amlaunch.preprocess.sources.remote_file import RemoteFile
from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.format.schema import Preprocess

UNKNOWN_BYTES = 1 << 40
"""Assumed size of a part whose size is unknown."""
HUB_PREFIX = "hf://datasets/"


@dataclass(frozen=True)
class DatasetFiles:
    """A dataset whose files we read ourselves."""

    options: Preprocess
    files: tuple[SourceFile, ...]
    parts: tuple[tuple[FileSlice, ...], ...]

    @property
    def sizes(self) -> Sequence[int]:
        """Bytes of each part."""
        return [sum(file_slice.size for file_slice in part) for part in self.parts]

    def identity(self) -> dict[str, Any]:
        """Describe the dataset, with the names (on the hub with the commit) and sizes of its files."""
        digest = listing_digest((file.name, file.size) for file in self.files)
        return {**dataset_options(self.options), "files": len(self.files), "digest": digest}

    def records(self, part: int, skip: int) -> Iterator[Record]:
        """Yield the records of a part without the first ``skip``. Raises ExternalFailure if the hub stops answering."""
        return read_records(self.parts[part], self.options, skip)


@dataclass(frozen=True)
class StreamedDataset:
    """A dataset in a format that only ``datasets`` reads."""

    options: Preprocess
    stream: Any
    """``datasets.IterableDataset``"""

    @property
    def sizes(self) -> Sequence[int]:
        """Assumed bytes of each part; a part is a file of unknown size."""
        return [UNKNOWN_BYTES] * int(self.stream.num_shards)

    def identity(self) -> dict[str, Any]:
        """Describe the dataset, with the names and sizes of its files if it is a local folder."""
        return {**dataset_options(self.options), **local_folder_digest(str(self.options.dataset))}

    def records(self, part: int, skip: int) -> Iterator[Record]:
        """Yield the rows of a part without the first ``skip``. Raises ExternalFailure if the hub stops answering."""
        column = self.options.text_column
        stream = self.stream.shard(num_shards=len(self.sizes), index=part)
        rows = stream.skip(skip) if skip else stream
        try:
            for number, row in enumerate(rows, skip):
                yield self._record(row, column, f"dataset {self.options.dataset}: row {number} of part {part}")
        except ConnectionError as error:
            raise ExternalFailure(hub_unreachable_message(self.options, error)) from None

    def _record(self, row: dict[str, Any], column: str, location: str) -> Record:
        if column not in row:
            raise BadInput(missing_column_message(location, column, row))
        text = row[column]
        if text is None:
            return SkippedRecord("null")
        if not isinstance(text, str):
            return DamagedRecord("not text", f"{location}: column {column!r} holds {type(text).__name__}, not text")
        return text


def dataset_options(options: Preprocess) -> dict[str, Any]:
    """Return the recipe's options that select a dataset."""
    selection = {
        "kind": "dataset",
        "dataset": options.dataset,
        "set_name": options.set_name,
        "split": options.split,
        "text_column": options.text_column,
    }
    if options.revision:
        selection["revision"] = options.revision
    return selection


def local_folder_digest(dataset: str) -> dict[str, str]:
    """Return a digest of the files of a dataset that is a local folder; empty for one on the hub."""
    folder = Path(dataset)
    if not folder.is_dir():
        return {}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {"digest": listing_digest((path.relative_to(folder).as_posix(), path.stat().st_size) for path in files)}


def open_dataset(options: Preprocess) -> DatasetFiles | StreamedDataset:
    """Open a dataset, cut into parts.

    Raises BadInput for a wrong name, set or split, and ExternalFailure if the hub cannot be reached.
    """
    try:
        import datasets
    except ImportError:
        raise BadInput(
            'preprocess.dataset: Hugging Face datasets need another package: pip install "amlaunch[hf]"'
        ) from None
    try:
        builder = datasets.load_dataset_builder(str(options.dataset), name=options.set_name, revision=options.revision)
        files = readable_files(builder, options)
        if files:
            return DatasetFiles(options, tuple(files), tuple(cut_into_parts(files, options)))
        return StreamedDataset(options, builder.as_streaming_dataset(split=options.split))
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        # Wrong names of dataset, set or split; the message of datasets lists the valid ones.
        raise BadInput(f"preprocess.dataset: {options.dataset}: {error}") from None
    except (OSError, RuntimeError) as error:
        # The errors of huggingface_hub and httpx are of these types.
        raise ExternalFailure(hub_unreachable_message(options, error)) from None


def readable_files(builder: Any, options: Preprocess) -> list[SourceFile]:
    """Return the files of a split if we can read all of them ourselves, else an empty list."""
    data_files = builder.config.data_files
    if not data_files or builder.name not in ("parquet", "json"):
        return []
    if options.split not in data_files:
        raise ValueError(f"no split {options.split!r}; available splits: {', '.join(map(str, data_files))}")
    paths = [str(path) for path in data_files[options.split]]
    if not all(path.endswith((".parquet", *JSON_LINES_SUFFIXES)) for path in paths):
        return []
    return [_hub_file(path, options) if path.startswith(HUB_PREFIX) else _local_file(path, options) for path in paths]


def _local_file(path_text: str, options: Preprocess) -> SourceFile:
    path = Path(path_text)
    folder = Path(str(options.dataset)).resolve()
    name = path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name
    return LocalFile(path, name, path.stat().st_size)


def _hub_file(path: str, options: Preprocess) -> SourceFile:
    """Return the file at ``hf://datasets/OWNER/NAME@COMMIT/PATH``."""
    from huggingface_hub import HfFileSystem, constants, get_token, hf_hub_url

    system = HfFileSystem()
    resolved: Any = system.resolve_path(path)
    repository, commit, path_in_repository = resolved.repo_id, resolved.revision, resolved.path_in_repo
    url = hf_hub_url(repository, path_in_repository, repo_type="dataset", revision=commit, endpoint=constants.ENDPOINT)
    cache_path = None
    if options.data_cache_dir:
        cache_path = Path(options.data_cache_dir).expanduser() / f"{repository}@{commit}" / path_in_repository
    return RemoteFile(url, f"{commit}/{path_in_repository}", int(system.info(path)["size"]), cache_path, get_token())


def hub_unreachable_message(options: Preprocess, error: Exception) -> str:
    """Return the message for a hub that cannot be reached, with the ways around it."""
    return (
        f"preprocess.dataset: {options.dataset}: cannot reach the Hugging Face hub from this machine ({error}). If "
        f"jobs have no internet access, download the dataset once on a machine that has it (hf download --repo-type "
        f"dataset {options.dataset} --local-dir DIR) and set preprocess.dataset to DIR, or preprocess.data_files to "
        f"DIR/**/*.parquet. Or download it with HF_HOME on the shared file system and export the same HF_HOME in the "
        f"jobs"
    )
