"""Token shards as samples: windows of one length, whole documents in packed rows, or a mixture of sources.

Window i of a stream of tokens is its tokens [i·L, i·L + L) as inputs and
[i·L + 1, i·L + L] as labels, so every target is seen once an epoch. In which
order they are seen is :mod:`amlaunch.trainer.data.sample_order`'s; files, ranks and readers only
decide who reads a sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from amlaunch.recipes.errors import BadInput, did_you_mean
from amlaunch.recipes.files import fingerprint
from amlaunch.trainer.data.packing import PackedRows, assign_rows, cut_documents
from amlaunch.trainer.data.sample_order import Indices, MixtureOrder, SampleOrder, SourceOrder, whole_shares
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

    ``file_pattern`` is a glob, a list of globs, or the path of a manifest; None:
    ``split`` of the manifest in ``data_dir``, the folder that the run's
    preprocess stage filled. ``format`` raw: files of bare uint16.
    ``shuffle_files`` shuffles all windows. ``align_to_bos`` lets every window
    begin with a document, where our index says that one begins, or at
    ``bos_token``; the tokens between a window's end and the next document are
    left out. ``drop_last`` and ``infinite`` are the guide's and change nothing:
    a step always has its full batch, and epochs follow one another until the
    last step. Raises BadInput for shards that are missing or damaged.
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
            raise BadInput(f"dataset.format {format!r}: {did_you_mean(format, FORMATS)}")
        self.seq_len = seq_len
        self.shuffle = shuffle_files
        self.bos = bos_token
        self.aligned = align_to_bos
        self.shards = (
            open_matching_shards(file_pattern, format, split)
            if file_pattern
            else open_manifest_shards(_folder(data_dir), split)
        )
        self.stream = TokenStream([shard.tokens for shard in self.shards])
        self.starts = aligned_starts(self._documents(), len(self.stream), seq_len) if align_to_bos else None

    def __len__(self) -> int:
        """Number of windows."""
        return (len(self.stream) - 1) // self.seq_len if self.starts is None else len(self.starts)

    def batch(self, windows: Indices) -> tuple[Tokens, ...]:
        """``((M, L + 1) tokens,)`` of the windows; the trainer makes inputs and labels of them on the device."""
        starts = windows * self.seq_len if self.starts is None else self.starts[windows]
        return (self.stream.read(starts, self.seq_len + 1),)

    def packed(self, size: int) -> PackedDataset:
        """The same documents, whole, in rows of ``size`` tokens."""
        return PackedDataset(self, size)

    def order(self, seed: int) -> SourceOrder:
        """The order of the windows. Raises BadInput where there is not one."""
        if len(self) == 0:
            more = f" and {len(self.shards) - 1} more" * (len(self.shards) > 1)
            raise BadInput(
                f"{self.shards[0].path}{more}: {len(self.stream):,} tokens, too few for one window of seq_len {self.seq_len}"
            )
        return SourceOrder(len(self), seed, self.shuffle)

    def fingerprint(self) -> dict[str, Any]:
        """What another data set would differ in."""
        listed = [{**shard.identity, "tokens": len(shard.tokens)} for shard in self.shards]
        own = {"shards": fingerprint(listed), "tokens": len(self.stream), "seq_len": self.seq_len}
        return {**own, "align_to_bos": True, "bos_token": self.bos} if self.aligned else own

    def describe(self) -> str:
        """How many samples there are, and what is not in them."""
        left_out = (
            f" ({1 - len(self) * self.seq_len / len(self.stream):.1%} of the tokens lie between them)"
            if self.aligned
            else ""
        )
        return f"{len(self):,} windows{left_out}"

    def _documents(self) -> Indices:
        starts = document_starts(self.shards, self.bos)
        if len(starts) == 0:
            raise BadInput(
                f"dataset.bos_token {self.bos}: not one in the {len(self.stream):,} tokens of {self.shards[0].path.name} and what follows"
            )
        return starts


def _folder(data_dir: str | None) -> Path:
    if data_dir is None:
        raise BadInput("dataset.file_pattern is missing, and no --data DIR says where the run's shards are")
    return Path(data_dir)


class PackedDataset:
    """The documents of a data set, each whole, several in a row of ``size`` tokens.

    A document of more than ``size`` tokens, or than the data set's ``seq_len``,
    is cut into pieces of that many, each with positions from 0. Every token is
    an input once an epoch. The last token of a document has the next one's
    beginning-of-sequence token as its label, as in a window, and no label where
    documents begin with no such token. Padding has none.
    """

    def __init__(self, dataset: NanogptDataset, size: int):
        self.seq_len = size
        self.shuffle = dataset.shuffle
        self._dataset = dataset
        starts = dataset._documents()
        if starts[0] > 0:  # the first shard begins within a document
            starts = np.concatenate([[0], starts])
        bos = common_first_token(dataset.stream, starts[1:]) if dataset.bos is None else dataset.bos
        self.documents = len(starts)
        pieces = cut_documents(starts, len(dataset.stream), min(size, dataset.seq_len), every_label=bos is not None)
        self.pieces = len(pieces.lengths)
        self.rows = PackedRows(dataset.stream, pieces, assign_rows(pieces.lengths, size), size)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def batch(self, rows: Indices) -> tuple[Tokens, ...]:
        """Inputs, labels and marks, each ``(M, size)``; see :meth:`amlaunch.trainer.data.packing.Rows.read`."""
        return self.rows.read(rows)

    def order(self, seed: int) -> SourceOrder:
        """The order of the rows."""
        return SourceOrder(len(self), seed, self.shuffle)

    def fingerprint(self) -> dict[str, Any]:
        """What another data set would differ in."""
        return {**self._dataset.fingerprint(), "packed_sequence_size": self.seq_len}

    def describe(self) -> str:
        """How full the rows are, and how many documents did not fit."""
        filled = len(self._dataset.stream) / (len(self) * self.seq_len)
        split = self.rows.split
        return f"{self.documents:,} documents in {len(self):,} rows of {self.seq_len:,}, {filled:.1%} filled, {split:,} of them cut"


class MixedDataset:
    """Several sources of tokens, each with its share of the samples.

    ``sources`` maps names to the keys of a :class:`NanogptDataset` and a
    ``weight``; without any weight a source has a share by its size. Which
    sample of which source comes when is a function of the position in the run.
    """

    def __init__(
        self, *, sources: dict[str, Any], seq_len: int = 1024, shuffle_files: bool = False, data_dir: str | None = None
    ):
        same = {"seq_len": seq_len, "shuffle_files": shuffle_files, "data_dir": data_dir}
        made = {
            name: _source(name, keys, same) for name, keys in sorted(sources.items())
        }  # in whatever order they are written
        weights = {name: sources[name].get("weight") for name in made}
        if not made or (None in weights.values() and any(weights.values())):
            raise BadInput("dataset.sources: give some, and a weight to all of them or to none")
        self._set(made, weights if all(weights.values()) else None)

    def _set(self, sources: Mapping[str, Any], weights: Mapping[str, Any] | None) -> None:
        self.sources = dict(sources)
        self.weights = weights
        first = next(iter(self.sources.values()))
        self.seq_len, self.shuffle = first.seq_len, first.shuffle
        self.ends = np.cumsum([len(source) for source in self.sources.values()], dtype=np.int64)

    def __len__(self) -> int:
        """Samples of all sources."""
        return int(self.ends[-1])

    def packed(self, size: int) -> MixedDataset:
        """The same sources, each packed; weights then count rows."""
        mixed = MixedDataset.__new__(MixedDataset)
        mixed._set({name: source.packed(size) for name, source in self.sources.items()}, self.weights)
        return mixed

    def batch(self, samples: Indices) -> tuple[Tokens, ...]:
        """As the sources' own, of samples numbered through all of them."""
        which = np.searchsorted(self.ends, samples, side="right")
        whole: list[Tokens] = []
        for k, source in enumerate(self.sources.values()):
            here = np.flatnonzero(which == k)
            if len(here):
                whole = _placed(whole, source.batch(samples[here] - (self.ends[k - 1] if k else 0)), here, len(samples))
        return tuple(whole)

    def order(self, seed: int) -> MixtureOrder:
        """Which sample of which source comes when."""
        sizes = {name: len(source) for name, source in self.sources.items()}
        shares = whole_shares(self.weights or sizes)
        return MixtureOrder(tuple(self.sources), tuple(source.order(seed) for source in self.sources.values()), shares)

    def fingerprint(self) -> dict[str, Any]:
        """What another mixture would differ in, each source's under its name."""
        own = {
            f"sources.{name}.{key}": value
            for name, source in self.sources.items()
            for key, value in source.fingerprint().items()
        }
        return {**own, "weights": dict(zip(self.sources, self.order(0).shares, strict=True))}

    def describe(self) -> str:
        """Each source's share and samples."""
        shares = self.order(0).shares
        return "; ".join(
            f"{name} {share / sum(shares):.1%}: {source.describe()}"
            for (name, source), share in zip(self.sources.items(), shares, strict=True)
        )


def _source(name: str, keys: Mapping[str, Any], same: Mapping[str, Any]) -> NanogptDataset:
    try:
        return NanogptDataset(**{key: value for key, value in keys.items() if key != "weight"}, **same)
    except BadInput as error:
        raise BadInput(f"dataset.sources.{name}: {error}") from None


def _placed(whole: list[Tokens], arrays: tuple[Tokens, ...], here: Indices, count: int) -> list[Tokens]:
    """``arrays`` of one source at the rows ``here`` of the whole batch, which is as wide as the widest type so far."""
    if not whole:
        whole = [np.empty((count, *array.shape[1:]), array.dtype) for array in arrays]
    for i, array in enumerate(arrays):
        if array.dtype.itemsize > whole[i].dtype.itemsize:
            whole[i] = whole[i].astype(array.dtype)
        whole[i][here] = array
    return whole


def read_samples(dataset: Any, indices: Indices) -> tuple[Tokens, ...]:
    """The samples at ``indices`` as host arrays: ``((M, L + 1),)``, or inputs and labels, each ``(M, L)``, and marks,
    if there are several documents in a sample (see :mod:`amlaunch.trainer.data.packing`).

    A data set of the user's own has ``__len__`` and ``__getitem__``, which gives
    ``{"input_ids": (L,), "labels": (L,)}``, labels already shifted, -100 where none counts.
    """
    if hasattr(dataset, "batch"):
        return dataset.batch(indices)
    samples = [dataset[int(index)] for index in indices]
    return tuple(np.stack([np.asarray(sample[key]) for sample in samples]) for key in ("input_ids", "labels"))


def sample_length(dataset: Any) -> int:
    """L: the tokens that one sample feeds to the model."""
    length = getattr(dataset, "seq_len", None)
    return int(length) if length else len(dataset[0]["input_ids"])


def sample_order_of(dataset: Any, seed: int) -> SampleOrder:
    """The order of a data set's samples; one of the user's own is shuffled where it has an attribute ``shuffle`` that is true."""
    if hasattr(dataset, "order"):
        return dataset.order(seed)
    return SourceOrder(len(dataset), seed, bool(getattr(dataset, "shuffle", False)))


def pack_dataset(dataset: Any, size: int) -> Any:
    """``dataset`` with its documents packed into rows of ``size``; 0: as it is. Raises BadInput where it has no documents."""
    if not size:
        return dataset
    if not hasattr(dataset, "packed"):
        raise BadInput(
            f"packed_sequence.packed_sequence_size: {type(dataset).__name__} has no documents to pack (a method packed(size)); write 0"
        )
    return dataset.packed(size)


def data_fingerprint(dataset: Any, seed: int, batch: int) -> dict[str, Any]:
    """What must be equal for a checkpoint's step to mean the same place in the data."""
    own = dataset.fingerprint() if hasattr(dataset, "fingerprint") else {"samples": len(dataset)}
    return {**own, "shuffle": bool(getattr(dataset, "shuffle", False)), "seed": seed, "global_batch_size": batch}
