"""Token shards as samples: windows of one length, complete documents in packed rows, or a mixture of sources.

Window i of a stream of tokens has the tokens [i·L, i·L + L) as inputs and [i·L + 1, i·L + L] as labels, so every target
is seen once an epoch. :mod:`amlaunch.trainer.data.sample_order` sets the order of the samples; files, ranks and readers
only decide who reads a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from amlaunch.recipes.errors import BadInput
from amlaunch.recipes.files import fingerprint
from amlaunch.recipes.suggestions import did_you_mean
from amlaunch.trainer.data.packing import PackedRows, assign_rows, cut_documents
from amlaunch.trainer.data.sample_order import Indices, MixtureOrder, SampleOrder, SourceOrder, integer_shares
from amlaunch.trainer.data.token_stream import (
    FORMATS,
    Tokens,
    TokenStream,
    aligned_starts,
    common_first_token,
    document_starts,
    open_manifest_shards,
    open_matching_shards,
)


class NanogptDataset:
    """Token shards (see :mod:`amlaunch.trainer.data.token_stream`) as windows of ``seq_len``.

    ``file_pattern`` is a glob, a list of globs, or the path of a manifest; None means ``split`` of the manifest in
    ``data_dir``, the folder that the run's preprocess stage filled. ``format`` raw: files of bare uint16.
    ``shuffle_files`` shuffles all windows. ``align_to_bos`` lets every window begin with a document, which begins where
    our index says, or at ``bos_token``; the tokens between a window's end and the next document are skipped.
    ``drop_last`` and ``infinite`` are accepted for NeMo AutoModel's recipes and have no effect: a step always has its
    full batch, and epochs repeat until the last step. Raises BadInput for missing or damaged shards.
    """

    def __init__(
        self,
        *,
        file_pattern: str | list[str] | None = None,
        seq_len: int = 1024,
        shuffle_files: bool = False,
        align_to_bos: bool = False,
        bos_token: int | None = None,
        drop_last: bool = True,
        infinite: bool = False,
        split: str = "train",
        data_dir: str | None = None,
        format: str = "bin",
    ):
        if format not in FORMATS:
            raise BadInput(f"dataset.format {format!r} is not supported; {did_you_mean(format, FORMATS)}")
        self.seq_len = seq_len
        self.shuffle = shuffle_files
        self.bos = bos_token
        self.aligned = align_to_bos
        if file_pattern:
            self.shards = open_matching_shards(file_pattern, format, split)
        elif data_dir is not None:
            self.shards = open_manifest_shards(Path(data_dir), split)
        else:
            raise BadInput("dataset.file_pattern is missing; set it, or pass --data DIR with the run's shards")
        self.stream = TokenStream([shard.tokens for shard in self.shards])
        self.starts = aligned_starts(self.document_starts(), len(self.stream), seq_len) if align_to_bos else None

    def __len__(self) -> int:
        """Return the number of windows."""
        return (len(self.stream) - 1) // self.seq_len if self.starts is None else len(self.starts)

    def batch(self, windows: Indices) -> tuple[Tokens, ...]:
        """Read ``((M, L + 1) tokens,)`` of the windows; inputs and labels are separated on the device."""
        starts = windows * self.seq_len if self.starts is None else self.starts[windows]
        return (self.stream.read(starts, self.seq_len + 1),)

    def packed(self, size: int) -> PackedDataset:
        """Return the same documents, packed into rows of ``size`` tokens."""
        return PackedDataset(self, size)

    def order(self, seed: int) -> SourceOrder:
        """Return the order of the windows. Raises BadInput if there is no window."""
        if len(self) == 0:
            more = f" and {len(self.shards) - 1} more" if len(self.shards) > 1 else ""
            raise BadInput(
                f"{self.shards[0].path}{more}: {len(self.stream):,} tokens are too few for one window of seq_len "
                f"{self.seq_len}; use more tokens or a smaller seq_len"
            )
        return _order_of(self, self.stream, seed)

    def fingerprint(self) -> dict[str, Any]:
        """Return the facts that identify this data set."""
        shards = [{**shard.identity, "tokens": len(shard.tokens)} for shard in self.shards]
        facts = {"shards": fingerprint(shards), "tokens": len(self.stream), "seq_len": self.seq_len}
        return {**facts, "align_to_bos": True, "bos_token": self.bos} if self.aligned else facts

    def describe(self) -> str:
        """Describe the number of samples, and the share of tokens that they skip."""
        if not self.aligned:
            return f"{len(self):,} windows"
        skipped = 1 - len(self) * self.seq_len / len(self.stream)
        return f"{len(self):,} windows ({skipped:.1%} of the tokens are in no window)"

    def document_starts(self) -> Indices:
        """Return the starts of documents in the stream. Raises BadInput if ``bos_token`` does not occur."""
        starts = document_starts(self.shards, self.bos)
        if len(starts) == 0:
            more = f" and {len(self.shards) - 1} more" if len(self.shards) > 1 else ""
            raise BadInput(
                f"dataset.bos_token {self.bos} does not occur in the {len(self.stream):,} tokens of "
                f"{self.shards[0].path.name}{more}; set it to the token that begins each document"
            )
        return starts


class PackedDataset:
    """Complete documents of a data set, several in each row of ``size`` tokens.

    A document longer than ``size`` or the data set's ``seq_len`` is cut into pieces of that length, each with positions
    from 0. Every token is an input once an epoch. The label of a document's last token is the next document's
    beginning-of-sequence token, as in a window; it has no label if documents begin with no such token. Padding has no
    labels.
    """

    def __init__(self, dataset: NanogptDataset, size: int):
        self.seq_len = size
        self.shuffle = dataset.shuffle
        self.shards = dataset.shards
        self._dataset = dataset
        starts = dataset.document_starts()
        # The first shard begins within a document.
        if starts[0] > 0:
            starts = np.concatenate([[0], starts])
        bos = common_first_token(dataset.stream, starts[1:]) if dataset.bos is None else dataset.bos
        self.documents = len(starts)
        pieces = cut_documents(starts, len(dataset.stream), min(size, dataset.seq_len), every_label=bos is not None)
        self.pieces = len(pieces.lengths)
        self.rows = PackedRows(dataset.stream, pieces, assign_rows(pieces.lengths, size), size)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def batch(self, rows: Indices) -> tuple[Tokens, ...]:
        """Read inputs, labels and marks, each ``(M, size)``; see :class:`amlaunch.trainer.data.packing.PackedRows`."""
        return self.rows.read(rows)

    def order(self, seed: int) -> SourceOrder:
        """Return the order of the rows."""
        return _order_of(self, self._dataset.stream, seed)

    def fingerprint(self) -> dict[str, Any]:
        """Return the facts that identify this data set."""
        return {**self._dataset.fingerprint(), "packed_sequence_size": self.seq_len}

    def describe(self) -> str:
        """Describe the rows, how full they are, and the number of documents that were cut."""
        filled = len(self._dataset.stream) / (len(self) * self.seq_len)
        return (
            f"{self.documents:,} documents in {len(self):,} rows of {self.seq_len:,}, {filled:.1%} filled, "
            f"{self.rows.split_documents:,} of them cut"
        )


def _order_of(dataset: NanogptDataset | PackedDataset, stream: TokenStream, seed: int) -> SourceOrder:
    """Return the order of a data set, whose ``stream`` was read from end to end before, but no longer is."""
    if dataset.shuffle:
        stream.expect_random_reads()
    return SourceOrder(len(dataset), seed, dataset.shuffle)


class MixedDataset:
    """Several sources of tokens, each with its share of the samples.

    ``sources`` maps names to the keys of a :class:`NanogptDataset` and a ``weight``; if no source has a weight, shares
    are proportional to size. The order of sources and samples is a function of the position in the run.
    """

    def __init__(
        self, *, sources: dict[str, Any], seq_len: int = 1024, shuffle_files: bool = False, data_dir: str | None = None
    ):
        common = {"seq_len": seq_len, "shuffle_files": shuffle_files, "data_dir": data_dir}
        # Sorted, so that their order in the recipe does not matter.
        datasets = {name: _open_source(name, keys, common) for name, keys in sorted(sources.items())}
        weights = {name: sources[name].get("weight") for name in datasets}
        if not datasets:
            raise BadInput("dataset.sources is empty; add at least one source")
        if None in weights.values() and any(weights.values()):
            raise BadInput("dataset.sources: only some sources have a weight; add one to all of them or to none")
        self._set_sources(datasets, weights if all(weights.values()) else None)

    def _set_sources(self, sources: Mapping[str, Any], weights: Mapping[str, Any] | None) -> None:
        self.sources = dict(sources)
        self.shards = [shard for source in self.sources.values() for shard in source.shards]
        self.weights = weights
        first = next(iter(self.sources.values()))
        self.seq_len, self.shuffle = first.seq_len, first.shuffle
        self.ends = np.cumsum([len(source) for source in self.sources.values()], dtype=np.int64)

    def __len__(self) -> int:
        """Return the number of samples of all sources."""
        return int(self.ends[-1])

    def packed(self, size: int) -> MixedDataset:
        """Return the same sources, each packed; weights then apply to rows."""
        mixed = MixedDataset.__new__(MixedDataset)
        mixed._set_sources({name: source.packed(size) for name, source in self.sources.items()}, self.weights)
        return mixed

    def batch(self, samples: Indices) -> tuple[Tokens, ...]:
        """Read samples, numbered through all sources, as the sources' own ``batch`` does."""
        source_of_sample = np.searchsorted(self.ends, samples, side="right")
        batch: list[Tokens] = []
        for k, source in enumerate(self.sources.values()):
            rows = np.flatnonzero(source_of_sample == k)
            if len(rows):
                offset = self.ends[k - 1] if k else 0
                batch = _place_rows(batch, source.batch(samples[rows] - offset), rows, len(samples))
        return tuple(batch)

    def order(self, seed: int) -> MixtureOrder:
        """Return the order of sources and samples."""
        sizes = {name: len(source) for name, source in self.sources.items()}
        orders = tuple(source.order(seed) for source in self.sources.values())
        return MixtureOrder(tuple(self.sources), orders, integer_shares(self.weights or sizes))

    def fingerprint(self) -> dict[str, Any]:
        """Return the facts that identify this mixture, those of each source under its name."""
        facts = {
            f"sources.{name}.{key}": value
            for name, source in self.sources.items()
            for key, value in source.fingerprint().items()
        }
        return {**facts, "weights": dict(zip(self.sources, self.order(0).shares, strict=True))}

    def describe(self) -> str:
        """Describe each source's share and samples."""
        shares = self.order(0).shares
        return "; ".join(
            f"{name} {share / sum(shares):.1%}: {source.describe()}"
            for (name, source), share in zip(self.sources.items(), shares, strict=True)
        )


def _open_source(name: str, keys: Mapping[str, Any], common: Mapping[str, Any]) -> NanogptDataset:
    try:
        return NanogptDataset(**{key: value for key, value in keys.items() if key != "weight"}, **common)
    except BadInput as error:
        raise BadInput(f"dataset.sources.{name}: {error}") from None


def _place_rows(batch: list[Tokens], arrays: tuple[Tokens, ...], rows: Indices, count: int) -> list[Tokens]:
    """Write ``arrays`` of one source into ``rows`` of the ``batch`` of ``count`` rows, which has the widest type."""
    if not batch:
        batch = [np.empty((count, *array.shape[1:]), array.dtype) for array in arrays]
    for i, array in enumerate(arrays):
        if array.dtype.itemsize > batch[i].dtype.itemsize:
            batch[i] = batch[i].astype(array.dtype)
        batch[i][rows] = array
    return batch


def read_samples(dataset: Any, indices: Indices) -> tuple[Tokens, ...]:
    """Read the samples at ``indices`` into host arrays.

    Returns ``((M, L + 1),)``, or inputs and labels, each ``(M, L)``, with marks if samples hold several documents (see
    :mod:`amlaunch.trainer.data.packing`). A user's data set has ``__len__`` and a ``__getitem__`` that returns
    ``{"input_ids": (L,), "labels": (L,)}`` with labels already shifted and -100 for positions without a loss.
    """
    if hasattr(dataset, "batch"):
        return dataset.batch(indices)
    samples = [dataset[int(index)] for index in indices]
    return tuple(np.stack([np.asarray(sample[key]) for sample in samples]) for key in ("input_ids", "labels"))


def sample_length(dataset: Any) -> int:
    """Return L, the number of input tokens of a sample."""
    length = getattr(dataset, "seq_len", None)
    return int(length) if length else len(dataset[0]["input_ids"])


def sample_order_of(dataset: Any, seed: int) -> SampleOrder:
    """Return the order of the samples; a user's data set is shuffled if its attribute ``shuffle`` is true."""
    if hasattr(dataset, "order"):
        return dataset.order(seed)
    return SourceOrder(len(dataset), seed, bool(getattr(dataset, "shuffle", False)))


def pack_dataset(dataset: Any, size: int) -> Any:
    """Pack the documents of ``dataset`` into rows of ``size``; 0 returns it unchanged.

    Raises BadInput if it has no documents.
    """
    if not size:
        return dataset
    if not hasattr(dataset, "packed"):
        raise BadInput(
            f"packed_sequence.packed_sequence_size: {type(dataset).__name__} has no documents to pack. Set it to 0, "
            "or give the data set a method packed(size)"
        )
    return dataset.packed(size)


def data_fingerprint(dataset: Any, section: Mapping[str, Any], seed: int, batch: int) -> dict[str, Any]:
    """Return the facts that must be equal for a checkpoint's step to mean the same place in the data.

    A data set without ``fingerprint()`` is identified by its ``section`` of the recipe and by the size of its samples.
    """
    if hasattr(dataset, "fingerprint"):
        facts = dataset.fingerprint()
    else:
        facts = {**section, "samples": len(dataset), "sample_length": sample_length(dataset)}
    return {**facts, "shuffle": bool(getattr(dataset, "shuffle", False)), "seed": seed, "global_batch_size": batch}
