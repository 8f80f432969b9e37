"""Which tokens each step sees, as a function: nothing to save, nothing to restore.

The shards, one after another, are one stream of tokens. Window i is its tokens
[i·L, i·L + L) as inputs and [i·L + 1, i·L + L] as labels, so every target is
seen once an epoch. Global position g = step·B + j of a run is sample
``g mod N`` of epoch ``g div N``, and a seeded permutation of the epoch says
which window that is. Files, ranks and readers only decide who reads it.
"""

from __future__ import annotations

import glob
import hashlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from preprocess.shards import open_tokens, read_manifest
from recipes.errors import BadInput, did_you_mean
from recipes.files import fingerprint

ROUNDS = 8
"""Of the Feistel network; four already give a pseudorandom permutation (Luby and Rackoff 1988)."""

WAIT_SECONDS = 0.2
"""Between two questions whether a batch that does not come is still wanted."""
Indices = npt.NDArray[np.int64]
Tokens = npt.NDArray[Any]
T = TypeVar("T")


def permute(indices: Indices, size: int, seed: int, epoch: int) -> Indices:
    """Where a permutation of ``range(size)``, chosen by seed and epoch, takes each of ``indices``.

    A Feistel network permutes the next power of two; what lands outside is sent
    through again until it is inside (cycle walking), less than twice on average.
    """
    bits = max(2, (size - 1).bit_length())
    keys = np.frombuffer(hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * ROUNDS).digest(), dtype="<u8")
    found = _feistel(indices.astype(np.uint64), bits, keys)
    while (outside := np.flatnonzero(found >= size)).size:
        found[outside] = _feistel(found[outside], bits, keys)
    return found.astype(np.int64)


def _feistel(x: npt.NDArray[np.uint64], bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """One pass over ``bits`` bits; halves of unequal width swap widths each round, so the rounds must be even."""
    width, other = bits - bits // 2, bits // 2
    left, right = x >> np.uint64(width), x & np.uint64((1 << width) - 1)
    for key in keys:
        left, right = right, left ^ (_mix(right, key) & np.uint64((1 << other) - 1))
        width, other = other, width
    return left << np.uint64(width) | right


def _mix(x: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """A keyed 64-bit hash: the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = x + key  # arrays wrap around silently, which is what is meant
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


@dataclass(frozen=True)
class Order:
    """The order of ``size`` windows over all epochs."""

    size: int
    seed: int
    shuffle: bool

    def windows(self, positions: Indices) -> Indices:
        """The windows at global positions (0 is the first that the run sees)."""
        epochs, indices = np.divmod(positions, self.size)
        if not self.shuffle:
            return indices
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = permute(indices[here], self.size, self.seed, int(epoch))
        return indices


def share_of_step(step: int, batch: int, rank: int, ranks: int) -> Indices:
    """Global positions that ``rank`` takes of step ``step`` (from 0): its contiguous part of [step·B, (step + 1)·B)."""
    mine = batch // ranks
    return np.arange(mine, dtype=np.int64) + (step * batch + rank * mine)


class TokenStream:
    """Shards as one long stream of tokens, cut into windows of ``seq_len`` inputs and one label more."""

    def __init__(self, shards: Sequence[Tokens], seq_len: int):
        self.shards = list(shards)
        self.seq_len = seq_len
        self.ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64)
        self.dtype = max((shard.dtype for shard in shards), key=lambda dtype: dtype.itemsize)

    def __len__(self) -> int:
        """Number of windows."""
        return max(0, int(self.ends[-1]) - 1) // self.seq_len

    def read(self, windows: Indices) -> Tokens:
        """``(M, L + 1)`` tokens: inputs are all but the last column, labels all but the first."""
        rows = np.empty((len(windows), self.seq_len + 1), dtype=self.dtype)
        starts = windows * self.seq_len
        shards = np.searchsorted(self.ends, starts, side="right")
        offsets = starts - np.where(shards > 0, self.ends[shards - 1], 0)
        for row, shard, offset in zip(rows, shards.tolist(), offsets.tolist(), strict=True):
            self._copy(row, shard, offset)
        return rows

    def _copy(self, row: Tokens, shard: int, offset: int) -> None:
        done = 0
        while done < len(row):  # more than once only where a window crosses into the next shard
            part = self.shards[shard][offset : offset + len(row) - done]
            row[done : done + len(part)] = part
            done, shard, offset = done + len(part), shard + 1, 0


class NanogptDataset:
    """Token shards in the ``.bin`` layout (see :mod:`preprocess.shards`) as windows of ``seq_len``.

    ``file_pattern`` is a glob or a list of globs; None: ``split`` of the manifest
    in ``data_dir``, the folder that the run's preprocess stage filled.
    ``shuffle_files`` shuffles all windows. ``bos_token``, ``drop_last`` and
    ``infinite`` are the guide's and change nothing: a step always has its full
    batch, and epochs follow one another until the last step. Raises BadInput
    for shards that are missing or damaged, or too short for one window.
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
    ):
        if align_to_bos:
            raise BadInput("dataset.align_to_bos: this version cuts the stream into windows; write false")
        self.seq_len = seq_len
        self.shuffle = shuffle_files
        listed = _matching(file_pattern) if file_pattern else _of_manifest(data_dir, split)
        self.shards = [{**shard, "tokens": len(tokens)} for shard, tokens in listed]
        self.stream = TokenStream([tokens for _, tokens in listed], seq_len)
        if len(self.stream) == 0:
            raise BadInput(f"the {split} split has {self.stream.ends[-1]:,} tokens, too few for one window of seq_len {seq_len}")

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.stream)

    def batch(self, windows: Indices) -> tuple[Tokens, ...]:
        """``((M, L + 1) tokens,)`` of the windows; the trainer makes inputs and labels of them on the device."""
        return (self.stream.read(windows),)

    def fingerprint(self) -> dict[str, Any]:
        """What another data set would differ in."""
        return {"shards": fingerprint(self.shards), "tokens": int(self.stream.ends[-1]), "seq_len": self.seq_len}


Listed = list[tuple[dict[str, Any], Tokens]]


def _matching(pattern: str | list[str]) -> Listed:
    patterns = [pattern] if isinstance(pattern, str) else pattern
    listed: Listed = []
    for one in patterns:
        paths = sorted(Path(name) for name in glob.glob(one, recursive=True))
        if not paths:
            raise BadInput(f"dataset.file_pattern: nothing matches {one!r} (seen from {Path.cwd()})")
        listed += [_matched_shard(path) for path in paths]
    return listed


def _matched_shard(path: Path) -> tuple[dict[str, Any], Tokens]:
    tokens = open_tokens(path)  # which says what is wrong, also with a link to nowhere
    return {"file": path.name, "bytes": path.stat().st_size}, tokens


def _of_manifest(data_dir: str | None, split: str) -> Listed:
    if data_dir is None:
        raise BadInput("dataset.file_pattern is missing, and no --data DIR says where the run's shards are")
    folder = Path(data_dir)
    splits = read_manifest(folder)["splits"]
    if not splits.get(split):
        filled = [name for name, shards in splits.items() if shards]
        raise BadInput(f"{folder}: the manifest has no split {split!r}; {did_you_mean(split, filled)}")
    return [_listed_shard(folder, entry) for entry in splits[split]]


def _listed_shard(folder: Path, entry: dict[str, Any]) -> tuple[dict[str, Any], Tokens]:
    tokens = open_tokens(folder / entry["file"])
    if len(tokens) != entry["tokens"]:
        raise BadInput(f"{folder / entry['file']}: {len(tokens)} tokens, but the manifest counts {entry['tokens']}; preprocess again")
    return {"file": Path(entry["file"]).name, "sha256": entry["sha256"]}, tokens


def gather(dataset: Any, indices: Indices) -> tuple[Tokens, ...]:
    """The samples at ``indices`` as host arrays: ``((M, L + 1),)``, or inputs and labels, each ``(M, L)``.

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


def data_fingerprint(dataset: Any, order: Order, batch: int) -> dict[str, Any]:
    """What must be equal for a checkpoint's step to mean the same place in the data."""
    own = dataset.fingerprint() if hasattr(dataset, "fingerprint") else {"samples": len(dataset)}
    return {**own, "shuffle": order.shuffle, "seed": order.seed, "global_batch_size": batch}


class Prefetcher(Generic[T]):
    """Calls ``make(item)`` for each item in a thread, ``depth`` results ahead; an error comes out where it is used."""

    def __init__(self, make: Callable[[int], T], items: range, depth: int):
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, items), name="prefetch", daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[int], T], items: range) -> None:
        try:
            for item in items:
                if not self._put((make(item), None)):
                    return
        except BaseException as error:  # handed over to the loop, which raises it
            self._put((None, error))

    def _put(self, value: tuple[T | None, BaseException | None]) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(value, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def next(self, given_up: Callable[[], bool] = lambda: False) -> T | None:
        """The next result; raises what ``make`` raised. None where ``given_up`` says so while it is waited for."""
        while True:
            try:
                value, error = self._queue.get(timeout=WAIT_SECONDS)
                break
            except queue.Empty:
                if given_up():
                    return None
        if error is not None:
            raise error
        return value

    def close(self) -> None:
        """End the thread; one that is stuck in a read is left behind, for the process ends without it."""
        self._closed.set()
        self._thread.join(timeout=1.0)
