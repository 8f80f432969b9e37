"""The order of samples as a pure function: nothing to save, nothing to restore.

Global position g = step·B + j of a run is sample ``g mod N`` of epoch ``g div N``, mapped by a seeded permutation of
the epoch. With several sources, integer arithmetic assigns each position to a source and counts that source's earlier
positions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import numpy.typing as npt

FEISTEL_ROUNDS = 8
"""Rounds of the Feistel network; four already give a pseudorandom permutation (Luby and Rackoff 1988)."""
MAX_SHARE_SUM = 2**20
"""Largest sum of integer shares; shares with a larger sum are rounded. Positions up to 2**42 stay exact."""
Indices = npt.NDArray[np.int64]


def permute(indices: Indices, size: int, seed: int, epoch: int) -> Indices:
    """Map ``indices`` by a permutation of ``range(size)`` chosen by seed and epoch.

    A Feistel network permutes the next power of two; results outside the range pass through it again until they are
    inside (cycle walking), less than twice on average.
    """
    bits = max(2, (size - 1).bit_length())
    digest = hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * FEISTEL_ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8")
    permuted = _feistel(indices.astype(np.uint64), bits, keys)
    while (outside := np.flatnonzero(permuted >= size)).size:
        permuted[outside] = _feistel(permuted[outside], bits, keys)
    return permuted.astype(np.int64)


def _feistel(x: npt.NDArray[np.uint64], bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Pass ``x`` of ``bits`` bits through the network once.

    Halves of unequal width swap widths each round, so the number of rounds must be even.
    """
    left_bits, right_bits = bits - bits // 2, bits // 2
    left, right = x >> np.uint64(left_bits), x & np.uint64((1 << left_bits) - 1)
    for key in keys:
        left, right = right, left ^ (_mix(right, key) & np.uint64((1 << right_bits) - 1))
        left_bits, right_bits = right_bits, left_bits
    return left << np.uint64(left_bits) | right


def _mix(x: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """Hash 64-bit values with a key: the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    # Arrays wrap around silently, as intended.
    x = x + key
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def rank_positions(step: int, batch: int, rank: int, ranks: int) -> Indices:
    """Return the global positions of ``rank`` in a step (from 0): a contiguous slice of [step·B, (step + 1)·B)."""
    share = batch // ranks
    return np.arange(share, dtype=np.int64) + (step * batch + rank * share)


class SampleOrder(Protocol):
    """An order of samples over all epochs."""

    @property
    def size(self) -> int:
        """Number of samples in an epoch."""

    def samples(self, positions: Indices) -> Indices:
        """Return the samples at global positions; position 0 is the first of the run."""

    def epochs(self, position: int) -> dict[str, float]:
        """Return each source's epochs before ``position``, by name; empty if there is a single source."""


@dataclass(frozen=True)
class SourceOrder:
    """The order of the ``size`` samples of one source."""

    size: int
    seed: int
    shuffle: bool

    def samples(self, positions: Indices) -> Indices:
        """Return the samples at global positions."""
        epochs, indices = np.divmod(positions, self.size)
        if not self.shuffle:
            return indices
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            indices[in_epoch] = permute(indices[in_epoch], self.size, self.seed, int(epoch))
        return indices

    def epochs(self, position: int) -> dict[str, float]:
        """Return no epochs, because there is a single source."""
        return {}


@dataclass(frozen=True)
class MixtureOrder:
    """Interleaved sources: at any position, each deviates from its share by fewer samples than there are sources.

    Sample i of source k has the number ``offsets[k] + i``. An epoch has as many positions as all sources have samples:
    a source with a share above its size is seen more than once in it, another one less than once.
    """

    names: tuple[str, ...]
    orders: tuple[SourceOrder, ...]
    shares: tuple[int, ...]
    """Integer shares of the sources; see :func:`integer_shares`."""

    @property
    def size(self) -> int:
        """Number of samples in an epoch."""
        return sum(order.size for order in self.orders)

    @property
    def offsets(self) -> Indices:
        """Number of each source's first sample."""
        return np.cumsum([0, *(order.size for order in self.orders[:-1])], dtype=np.int64)

    def samples(self, positions: Indices) -> Indices:
        """Return the samples at global positions."""
        samples = np.empty_like(positions)
        for order, offset, (rows, source_positions) in zip(
            self.orders, self.offsets, self._assign(positions), strict=True
        ):
            samples[rows] = order.samples(source_positions) + offset
        return samples

    def _assign(self, positions: Indices) -> list[tuple[Indices, Indices]]:
        """Return, for each source, the indices of its ``positions`` and its own position at each of them.

        Each source in turn takes its share of the positions that the sources before it leave, evenly spread: of n
        positions, ``n·share div total``.
        """
        assigned = []
        rows, remaining = np.arange(len(positions)), positions
        total = sum(self.shares)
        for share in self.shares:
            before, after = remaining * share // total, (remaining + 1) * share // total
            is_own = after > before
            assigned.append((rows[is_own], before[is_own]))
            rows, remaining = rows[~is_own], (remaining - before)[~is_own]
            total -= share
        return assigned

    def epochs(self, position: int) -> dict[str, float]:
        """Return each source's epochs before ``position``, by name."""
        epochs, remaining, total = {}, position, sum(self.shares)
        for name, order, share in zip(self.names, self.orders, self.shares, strict=True):
            source_position = remaining * share // total
            epochs[name] = source_position / order.size
            remaining, total = remaining - source_position, total - share
        return epochs


def integer_shares(weights: Mapping[str, float] | Sequence[float]) -> tuple[int, ...]:
    """Return integers in proportion to ``weights``: exact for short decimals, else to a millionth of the sum."""
    values = list(weights.values()) if isinstance(weights, Mapping) else list(weights)
    exact = [Fraction(str(value)) for value in values]
    scale = math.lcm(*(value.denominator for value in exact))
    shares = [int(value * scale) for value in exact]
    divisor = math.gcd(*shares)
    shares = [share // divisor for share in shares]
    if sum(shares) > MAX_SHARE_SUM:
        shares = [max(1, round(value / sum(exact) * MAX_SHARE_SUM)) for value in exact]
    return tuple(shares)
