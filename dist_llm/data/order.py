"""Which tokens sample n is made of: a pure function of (seed, n), so no index file and no history.

Both orders map sample numbers to the offset of the window's first token, vectorised, in O(1)
memory, whatever the world size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

KEPT_BLOCKS = 16
ROUNDS = 6
TURNS = np.arange(ROUNDS, dtype=np.uint64)[:, None] << np.uint64(56)  # sets the rounds apart

# Of splitmix64. Made once: for a few samples numpy's cost is the number of its calls, not of its words.
GAMMA, MULTIPLY_1, MULTIPLY_2 = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
SHIFT_1, SHIFT_2, SHIFT_3 = map(np.uint64, (30, 27, 31))


class Order(Protocol):
    """Sample numbers -> offsets of first tokens."""

    def starts(self, samples: Ints) -> Ints: ...


@dataclass(frozen=True)
class Shuffle:
    """Cut the stream into windows; visit each once per epoch, in an order of the epoch's own."""

    seed: int
    n_windows: int
    window: int  # tokens from one start to the next

    def starts(self, samples: Ints) -> Ints:
        epochs, index = np.divmod(samples, self.n_windows)
        keys = mix(_words(epochs) ^ mix(_words([self.seed])))
        return permute(_words(index), self.n_windows, keys).astype(np.int64) * self.window


@dataclass(frozen=True)
class Random:
    """Uniform offsets with replacement, as nanoGPT draws them."""

    seed: int
    n_starts: int

    def starts(self, samples: Ints) -> Ints:
        drawn = mix(_words(samples) ^ mix(_words([self.seed])))
        # The bias of `%` is below n_starts / 2**64.
        return (drawn % np.uint64(self.n_starts)).astype(np.int64)


@dataclass(frozen=True)
class Mixture:
    """Which member of a mixture each sample is of: fixed quotas in every block of samples, scattered within it.

    So a member's share is exact over each block. Its samples are numbered in the order in which they come, so that
    wherever a mixture ends, another can go on.
    """

    seed: int
    quotas: tuple[int, ...]

    @staticmethod
    def of(weights: Sequence[float], seed: int, block: int = 1000) -> "Mixture":
        """Quotas of `block` samples in all, nearest to the weights (largest remainders); a weight above 0 gets one."""
        shares = np.asarray(weights, dtype=np.float64) / sum(weights) * block
        quotas = np.maximum(np.floor(shares), shares > 0).astype(np.int64)
        order = np.argsort(-(shares - np.floor(shares)), kind="stable")
        for place in range(block - int(quotas.sum())):
            quotas[order[place % len(order)]] += 1
        while quotas.sum() > block:  # the least shares were rounded up to 1: the largest pays
            quotas[quotas.argmax()] -= 1
        return Mixture(seed, tuple(quotas.tolist()))

    def split(self, samples: Ints) -> tuple[Ints, Ints]:
        """(member of each sample, how many of that member's samples come before it)."""
        blocks, index = np.divmod(samples, sum(self.quotas))
        members, numbers = np.empty_like(samples), np.empty_like(samples)
        for block in np.unique(blocks).tolist():
            rows = blocks == block
            owners, before = _scattered(self.seed, self.quotas, block)
            members[rows] = owners[index[rows]]
            numbers[rows] = block * np.asarray(self.quotas)[members[rows]] + before[index[rows]]
        return members, numbers

    def counts(self, samples: int) -> Ints:
        """How many of the first `samples` are each member's."""
        block = sum(self.quotas)
        blocks = samples // block
        members, _ = self.split(np.arange(blocks * block, samples))
        return blocks * np.asarray(self.quotas) + np.bincount(members, minlength=len(self.quotas))


@lru_cache(KEPT_BLOCKS)
def _scattered(seed: int, quotas: tuple[int, ...], block: int) -> tuple[Ints, Ints]:
    """Of each sample of a block, in order: its member, and how many of that member's come before it in the block."""
    ends = np.cumsum(quotas)
    key = mix(_words([block]) ^ mix(_words([seed])))
    places = permute(_words(np.arange(ends[-1])), int(ends[-1]), key).astype(np.int64)
    owners = np.searchsorted(ends, places, side="right")
    by_owner = np.argsort(owners, kind="stable")
    before = np.empty_like(by_owner)
    before[by_owner] = np.arange(len(owners)) - (ends - quotas)[owners[by_owner]]
    return owners, before


def permute(index: Words, size: int, keys: Words) -> Words:
    """A keyed bijection of [0, size): a Feistel network, walked until it lands inside.

    The network permutes the next even power of two above `size`, below 4 * size, so a walk
    takes under 4 steps on average (cycle walking, Black and Rogaway 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    turn_keys = np.broadcast_to(keys, index.shape) ^ TURNS
    out = index.copy()
    todo = np.arange(len(index))
    while len(todo):
        words = out[todo]
        left, right = words >> half, words & mask
        for key in turn_keys[:, todo]:
            left, right = right, left ^ (mix(right ^ key) & mask)
        out[todo] = words = left << half | right
        todo = todo[words >= size]
    return out


def mix(words: Words) -> Words:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit in moves every bit out."""
    words = words + GAMMA
    words ^= words >> SHIFT_1
    words *= MULTIPLY_1
    words ^= words >> SHIFT_2
    words *= MULTIPLY_2
    words ^= words >> SHIFT_3
    return words


def _words(values: npt.ArrayLike) -> Words:
    return np.asarray(values, dtype=np.int64).astype(np.uint64)
