"""Map sample numbers to windows: a pure function of (seed, n), without an index file or state.

Both orders return the offset of each window's first token. They are vectorised, use O(1) memory, and do not depend on
the world size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
UInts = npt.NDArray[np.uint64]

CACHED_BLOCKS = 16
ROUNDS = 6
# one constant per round, so that rounds have different keys
ROUND_CONSTANTS = np.arange(ROUNDS, dtype=np.uint64)[:, None] << np.uint64(56)

# Constants of splitmix64, built once: for few samples numpy's time depends on the number of calls, not elements.
GAMMA, MULTIPLY_1, MULTIPLY_2 = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
SHIFT_1, SHIFT_2, SHIFT_3 = map(np.uint64, (30, 27, 31))


class Order(Protocol):
    """Maps sample numbers to offsets of first tokens."""

    def locate(self, samples: Ints) -> Ints: ...


@dataclass(frozen=True)
class ShuffledOrder:
    """Cut the stream into windows and visit each once per epoch, in a different order in each epoch."""

    seed: int
    num_windows: int
    stride: int  # tokens between the offsets of neighbouring windows

    def locate(self, samples: Ints) -> Ints:
        epochs, index = np.divmod(samples, self.num_windows)
        keys = splitmix64(_to_uint64(epochs) ^ splitmix64(_to_uint64([self.seed])))
        return permute(_to_uint64(index), self.num_windows, keys).astype(np.int64) * self.stride


@dataclass(frozen=True)
class RandomOrder:
    """Draw uniform offsets with replacement, as nanoGPT does."""

    seed: int
    num_offsets: int

    def locate(self, samples: Ints) -> Ints:
        drawn = splitmix64(_to_uint64(samples) ^ splitmix64(_to_uint64([self.seed])))
        # The bias of `%` is below num_offsets / 2**64.
        return (drawn % np.uint64(self.num_offsets)).astype(np.int64)


@dataclass(frozen=True)
class Mixture:
    """Assigns samples to the components of a mixture: fixed quotas in every block of samples, shuffled within the
    block.

    A component's fraction is exact over each block. Its samples are numbered in order of use, so another mixture can
    continue where this one ends.
    """

    seed: int
    quotas: tuple[int, ...]

    @staticmethod
    def from_weights(weights: Sequence[float], seed: int, block: int = 1000) -> "Mixture":
        """Return quotas that sum to `block` (largest remainders). Each weight above 0 gets at least one sample."""
        exact = np.asarray(weights, dtype=np.float64) / sum(weights) * block
        quotas = np.maximum(np.floor(exact), exact > 0).astype(np.int64)
        order = np.argsort(-(exact - np.floor(exact)), kind="stable")
        for index in range(block - int(quotas.sum())):
            quotas[order[index % len(order)]] += 1
        while quotas.sum() > block:  # subtract the excess of quotas rounded up to 1 from the largest
            quotas[quotas.argmax()] -= 1
        return Mixture(seed, tuple(quotas.tolist()))

    def assign(self, samples: Ints) -> tuple[Ints, Ints]:
        """Return (component of each sample, its index among the samples of that component)."""
        blocks, index = np.divmod(samples, sum(self.quotas))
        component_ids, numbers = np.empty_like(samples), np.empty_like(samples)
        for block in np.unique(blocks).tolist():
            rows = blocks == block
            block_ids, before = _shuffle_block(self.seed, self.quotas, block)
            component_ids[rows] = block_ids[index[rows]]
            numbers[rows] = block * np.asarray(self.quotas)[component_ids[rows]] + before[index[rows]]
        return component_ids, numbers

    def count_samples(self, samples: int) -> Ints:
        """Return how many of the first `samples` samples each component has."""
        block = sum(self.quotas)
        blocks = samples // block
        component_ids, _ = self.assign(np.arange(blocks * block, samples))
        return blocks * np.asarray(self.quotas) + np.bincount(component_ids, minlength=len(self.quotas))


@lru_cache(CACHED_BLOCKS)
def _shuffle_block(seed: int, quotas: tuple[int, ...], block: int) -> tuple[Ints, Ints]:
    """Return, for each sample of a block, its component and its index among that component's samples in the block."""
    ends = np.cumsum(quotas)
    key = splitmix64(_to_uint64([block]) ^ splitmix64(_to_uint64([seed])))
    positions = permute(_to_uint64(np.arange(ends[-1])), int(ends[-1]), key).astype(np.int64)
    component_ids = np.searchsorted(ends, positions, side="right")
    by_component = np.argsort(component_ids, kind="stable")
    before = np.empty_like(by_component)
    before[by_component] = np.arange(len(component_ids)) - (ends - quotas)[component_ids[by_component]]
    return component_ids, before


def permute(index: UInts, size: int, keys: UInts) -> UInts:
    """Apply a keyed bijection of [0, size): a Feistel network with cycle walking (Black and Rogaway 2002).

    The network permutes the next even power of two above `size`, which is below 4 * size, so a walk takes fewer than 4
    steps on average.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    round_keys = np.broadcast_to(keys, index.shape) ^ ROUND_CONSTANTS
    permuted = index.copy()
    todo = np.arange(len(index))
    while len(todo):
        values = permuted[todo]
        left, right = values >> half, values & mask
        for key in round_keys[:, todo]:
            left, right = right, left ^ (splitmix64(right ^ key) & mask)
        permuted[todo] = values = left << half | right
        todo = todo[values >= size]
    return permuted


def splitmix64(values: UInts) -> UInts:
    """Apply the finalizer of splitmix64 (Steele et al. 2014): each input bit affects all output bits."""
    values = values + GAMMA
    values ^= values >> SHIFT_1
    values *= MULTIPLY_1
    values ^= values >> SHIFT_2
    values *= MULTIPLY_2
    values ^= values >> SHIFT_3
    return values


def _to_uint64(values: npt.ArrayLike) -> UInts:
    return np.asarray(values, dtype=np.int64).astype(np.uint64)
