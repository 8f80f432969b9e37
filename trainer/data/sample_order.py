"""In which order samples are seen, as a function: nothing to save, nothing to restore.

Global position g = step·B + j of a run is sample ``g mod N`` of epoch
``g div N``, and a seeded permutation of the epoch says which one that is. Of
several sources a rule of whole numbers says to which of them a position
belongs, and how many of that source were before it.
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
"""Of the Feistel network; four already give a pseudorandom permutation (Luby and Rackoff 1988)."""
MAX_SHARE_SUM = 2**20
"""Into so many parts shares are rounded where they are not whole numbers of fewer; positions up to 2**42 stay exact."""
Indices = npt.NDArray[np.int64]


def permute(indices: Indices, size: int, seed: int, epoch: int) -> Indices:
    """Where a permutation of ``range(size)``, chosen by seed and epoch, takes each of ``indices``.

    A Feistel network permutes the next power of two; what lands outside is sent
    through again until it is inside (cycle walking), less than twice on average.
    """
    bits = max(2, (size - 1).bit_length())
    keys = np.frombuffer(
        hashlib.blake2b(f"{seed}:{epoch}".encode(), digest_size=8 * FEISTEL_ROUNDS).digest(), dtype="<u8"
    )
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


def rank_positions(step: int, batch: int, rank: int, ranks: int) -> Indices:
    """Global positions that ``rank`` takes of step ``step`` (from 0): its contiguous part of [step·B, (step + 1)·B)."""
    mine = batch // ranks
    return np.arange(mine, dtype=np.int64) + (step * batch + rank * mine)


class SampleOrder(Protocol):
    """An order of samples over all epochs."""

    @property
    def size(self) -> int:
        """Samples of an epoch."""

    def samples(self, positions: Indices) -> Indices:
        """The samples at global positions (0 is the first that the run sees)."""

    def epochs(self, position: int) -> dict[str, float]:
        """How often each source has been seen before ``position``, by name; empty where there is one source."""


@dataclass(frozen=True)
class SourceOrder:
    """The order of the ``size`` samples of one source."""

    size: int
    seed: int
    shuffle: bool

    def samples(self, positions: Indices) -> Indices:
        """As of :class:`Sequenced`."""
        epochs, indices = np.divmod(positions, self.size)
        if not self.shuffle:
            return indices
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = permute(indices[here], self.size, self.seed, int(epoch))
        return indices

    def epochs(self, position: int) -> dict[str, float]:
        """As of :class:`Sequenced`."""
        return {}


@dataclass(frozen=True)
class MixtureOrder:
    """Several sources, interleaved: at any position each has had its share, fewer samples off than there are sources.

    Sample i of source k is number ``offsets[k] + i``. An epoch is as many
    positions as all sources have samples: one with a share above its size is
    seen more than once in it, another less.
    """

    names: tuple[str, ...]
    orders: tuple[SourceOrder, ...]
    shares: tuple[int, ...]
    """In proportion to these whole numbers; see :func:`whole_shares`."""

    @property
    def size(self) -> int:
        """As of :class:`Sequenced`."""
        return sum(order.size for order in self.orders)

    @property
    def offsets(self) -> Indices:
        """The number of each source's first sample."""
        return np.cumsum([0, *(order.size for order in self.orders[:-1])], dtype=np.int64)

    def samples(self, positions: Indices) -> Indices:
        """As of :class:`Sequenced`."""
        found = np.empty_like(positions)
        for order, offset, (places, counts) in zip(self.orders, self.offsets, self._dealt(positions), strict=True):
            found[places] = order.samples(counts) + offset
        return found

    def _dealt(self, positions: Indices) -> list[tuple[Indices, Indices]]:
        """For each source, which of ``positions`` are its own, and how many of its own were before each.

        Each source in turn takes its share of the positions that those before
        it have left, evenly spread: of n positions ``n·share div total``.
        """
        dealt = []
        places, left = np.arange(len(positions)), positions
        total = sum(self.shares)
        for share in self.shares:
            before, after = left * share // total, (left + 1) * share // total
            own = after > before
            dealt.append((places[own], before[own]))
            places, left = places[~own], (left - before)[~own]
            total -= share
        return dealt

    def epochs(self, position: int) -> dict[str, float]:
        """As of :class:`Sequenced`."""
        found, left, total = {}, position, sum(self.shares)
        for name, order, share in zip(self.names, self.orders, self.shares, strict=True):
            own = left * share // total
            found[name] = own / order.size
            left, total = left - own, total - share
        return found


def whole_shares(weights: Mapping[str, float] | Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in proportion to ``weights``: exact where they are short decimals, else to a millionth of the sum."""
    values = list(weights.values()) if isinstance(weights, Mapping) else list(weights)
    exact = [Fraction(str(value)) for value in values]
    scale = math.lcm(*(value.denominator for value in exact))
    whole = [int(value * scale) for value in exact]
    divisor = math.gcd(*whole)
    whole = [value // divisor for value in whole]
    if sum(whole) > MAX_SHARE_SUM:
        whole = [max(1, round(value / sum(exact) * MAX_SHARE_SUM)) for value in exact]
    return tuple(whole)
