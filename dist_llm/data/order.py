"""Map sample numbers to windows: a pure function of (seed, sample number), without an index file or state.

The functions are vectorised, use constant memory, and do not depend on the world size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
UInts = npt.NDArray[np.uint64]

NUM_CACHED_BLOCKS = 16  # shuffled blocks of a mixture
NUM_ROUNDS = 6  # of the Feistel network
# One constant per round, so that the rounds have different keys.
ROUND_CONSTANTS = np.arange(NUM_ROUNDS, dtype=np.uint64)[:, None] << np.uint64(56)

# Constants of splitmix64 as numpy scalars, built once: for few samples the number of numpy calls decides the time.
GAMMA, MULTIPLY_1, MULTIPLY_2 = map(np.uint64, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
SHIFT_1, SHIFT_2, SHIFT_3 = map(np.uint64, (30, 27, 31))


class Order(Protocol):
    """Maps sample numbers to windows."""

    def locate_windows(self, samples: Ints) -> Ints:
        """Return the offset of the first token of the window of each sample number."""
        ...


@dataclass(frozen=True)
class ShuffledOrder:
    """Cut the corpus into windows. Visit each window once per epoch, in a different order in each epoch."""

    seed: int
    num_windows: int
    stride: int  # tokens between the starts of neighbouring windows

    def locate_windows(self, samples: Ints) -> Ints:
        epochs, indices = np.divmod(samples, self.num_windows)
        keys = splitmix64(_to_uint64(epochs) ^ splitmix64(_to_uint64([self.seed])))
        return permute(_to_uint64(indices), self.num_windows, keys).astype(np.int64) * self.stride


@dataclass(frozen=True)
class RandomOrder:
    """Draw the offset of each window uniformly, with replacement, as nanoGPT does."""

    seed: int
    num_offsets: int

    def locate_windows(self, samples: Ints) -> Ints:
        random_bits = splitmix64(_to_uint64(samples) ^ splitmix64(_to_uint64([self.seed])))
        # The bias of `%` is below num_offsets / 2**64.
        return (random_bits % np.uint64(self.num_offsets)).astype(np.int64)


class Assignment(NamedTuple):
    """The component of a mixture that each sample belongs to. Both arrays have one element per sample."""

    component_ids: Ints
    indices: Ints  # of the sample among the samples of its component, in the order of use


@dataclass(frozen=True)
class Mixture:
    """Assigns samples to the components of a mixture (corpora or objectives).

    Samples come in blocks of `sum(quotas)`. Each block has `quotas[c]` samples of component c, in a shuffled order. So
    the fraction of a component is exact over a block. The samples of a component are numbered in the order of use, so a
    later mixture can continue where this one ends.
    """

    seed: int
    quotas: tuple[int, ...]  # samples of each component in a block

    @staticmethod
    def from_weights(weights: Sequence[float], seed: int, block_samples: int = 1000) -> "Mixture":
        """Round the weights to quotas that sum to `block_samples`, by largest remainders.

        Each component with a weight above 0 gets at least one sample per block.
        """
        exact = np.asarray(weights, dtype=np.float64) / sum(weights) * block_samples
        quotas = np.maximum(np.floor(exact), exact > 0).astype(np.int64)
        by_remainder = np.argsort(-(exact - np.floor(exact)), kind="stable")
        for index in range(block_samples - int(quotas.sum())):
            quotas[by_remainder[index % len(by_remainder)]] += 1
        while quotas.sum() > block_samples:  # some quotas were rounded up to 1: lower the largest
            quotas[quotas.argmax()] -= 1
        return Mixture(seed, tuple(quotas.tolist()))

    def assign(self, samples: Ints) -> Assignment:
        """Assign the samples with these numbers to components."""
        blocks, positions = np.divmod(samples, sum(self.quotas))
        component_ids, indices = np.empty_like(samples), np.empty_like(samples)
        for block in np.unique(blocks).tolist():
            rows = blocks == block
            block_component_ids, block_indices = _shuffle_block(self.seed, self.quotas, block)
            component_ids[rows] = block_component_ids[positions[rows]]
            indices[rows] = block * np.asarray(self.quotas)[component_ids[rows]] + block_indices[positions[rows]]
        return Assignment(component_ids, indices)

    def count_samples(self, num_samples: int) -> Ints:
        """Return how many of the first `num_samples` samples belong to each component."""
        block_samples = sum(self.quotas)
        num_full_blocks = num_samples // block_samples
        component_ids, _ = self.assign(np.arange(num_full_blocks * block_samples, num_samples))
        return num_full_blocks * np.asarray(self.quotas) + np.bincount(component_ids, minlength=len(self.quotas))


@lru_cache(NUM_CACHED_BLOCKS)
def _shuffle_block(seed: int, quotas: tuple[int, ...], block: int) -> Assignment:
    """Assign the samples of block number `block`. Indices count from the beginning of the block."""
    ends = np.cumsum(quotas)
    key = splitmix64(_to_uint64([block]) ^ splitmix64(_to_uint64([seed])))
    positions = permute(_to_uint64(np.arange(ends[-1])), int(ends[-1]), key).astype(np.int64)
    component_ids = np.searchsorted(ends, positions, side="right")
    by_component = np.argsort(component_ids, kind="stable")
    indices = np.empty_like(by_component)
    indices[by_component] = np.arange(len(component_ids)) - (ends - quotas)[component_ids[by_component]]
    return Assignment(component_ids, indices)


def permute(indices: UInts, domain_size: int, keys: UInts) -> UInts:
    """Apply a keyed permutation of [0, domain_size): a Feistel network with cycle walking (Black and Rogaway 2002).

    The network permutes a range of 2**(2k) numbers, with the least k that covers `domain_size`. A result outside of the
    domain is permuted again. The range has fewer than 4 * domain_size numbers, so this takes fewer than 4 passes on
    average.
    """
    half_bits = np.uint64(max(1, ((domain_size - 1).bit_length() + 1) // 2))
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    round_keys = np.broadcast_to(keys, indices.shape) ^ ROUND_CONSTANTS
    permuted = indices.copy()
    pending = np.arange(len(indices))
    while len(pending):
        values = permuted[pending]
        left, right = values >> half_bits, values & half_mask
        for key in round_keys[:, pending]:
            left, right = right, left ^ (splitmix64(right ^ key) & half_mask)
        permuted[pending] = values = left << half_bits | right
        pending = pending[values >= domain_size]
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
