"""An order maps sample n to the offset of its window. The offset depends only on the seed and n.

A shuffled order visits each window once per epoch. A random order draws offsets uniformly.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.schema import RunConfig
from dist_llm.data.order import RandomOrder, ShuffledOrder, permute, splitmix64

KEYS = np.array([0, 1, 2**63, 2**64 - 1], dtype=np.uint64)


def make_range(size):
    """Return the numbers from 0 to size - 1 as uint64, as `permute` expects them."""
    return np.arange(size, dtype=np.uint64)


@pytest.mark.parametrize("key", KEYS.tolist())
def test_permute_is_a_bijection_of_every_small_size(key):
    for size in range(1, 301):
        permuted = permute(make_range(size), size, np.uint64(key))
        assert np.array_equal(np.sort(permuted), make_range(size)), size


@pytest.mark.parametrize("size", [2**16 - 1, 2**16, 2**16 + 1, 99_991])
def test_permute_is_a_bijection_of_large_sizes(size):
    assert len(np.unique(permute(make_range(size), size, np.uint64(7)))) == size


def test_permute_stays_inside_sizes_too_large_to_list():
    for size in (2**33 + 1, 2**40, 10**13):
        sampled = np.linspace(0, size - 1, 500).astype(np.uint64)
        permuted = permute(sampled, size, np.uint64(3))
        assert permuted.max() < size
        assert len(np.unique(permuted)) == len(np.unique(sampled))
        assert permuted.max() > size // 2, "the upper half is never reached"


def test_permute_accepts_one_key_per_element():
    size = 101
    elements = np.tile(make_range(size), len(KEYS))
    permuted_at_once = permute(elements, size, np.repeat(KEYS, size))
    permuted_key_by_key = np.concatenate([permute(make_range(size), size, key) for key in KEYS])
    assert np.array_equal(permuted_at_once, permuted_key_by_key)
    assert np.array_equal(elements, np.tile(make_range(size), len(KEYS))), "permute changed its argument"


def test_keys_give_unrelated_permutations():
    size = 1000
    permutations = [permute(make_range(size), size, key) for key in KEYS]
    for index, permutation in enumerate(permutations):
        # On average, a random permutation has 1 fixed point and 2 pairs of neighbours that stay neighbours.
        assert (permutation == make_range(size)).sum() < 10
        assert (np.abs(np.diff(permutation.astype(np.int64))) == 1).sum() < 15
        for earlier in permutations[:index]:
            assert (permutation == earlier).sum() < 10


def test_splitmix64_matches_the_reference():
    """These are the first three outputs of the reference implementation (Vigna) from state 0."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    states = np.arange(3, dtype=np.uint64) * gamma
    assert [hex(word) for word in splitmix64(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


@pytest.mark.parametrize("num_windows", [1, 2, 3, 64, 65, 1000])
def test_a_shuffled_order_visits_every_window_once_per_epoch(num_windows):
    order = ShuffledOrder(seed=5, num_windows=num_windows, stride=7)
    epochs = order.locate_windows(np.arange(4 * num_windows)).reshape(4, num_windows)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(num_windows) * 7)
    if num_windows >= 64:
        assert all((epoch != earlier).mean() > 0.9 for index, epoch in enumerate(epochs) for earlier in epochs[:index])


ORDERS = {  # name: function from a seed to an order
    "shuffle": lambda seed: ShuffledOrder(seed, num_windows=100, stride=3),
    "random": lambda seed: RandomOrder(seed, num_offsets=100),
}


@pytest.mark.parametrize("kind", ORDERS)
@settings(deadline=None)  # the machine may be busy
@given(seed=st.integers(0, 2**40), first_sample=st.integers(0, 2**40), num_samples=st.integers(1, 30), data=st.data())
def test_locate_windows_depends_only_on_seed_and_sample_number(kind, seed, first_sample, num_samples, data):
    """The offsets do not depend on how samples are split or sorted. So a longer run starts like a shorter one."""
    samples = np.arange(first_sample, first_sample + num_samples)
    offsets = ORDERS[kind](seed).locate_windows(samples)
    split_index = data.draw(st.integers(0, num_samples))
    halves = samples[:split_index], samples[split_index:]
    offsets_of_halves = [ORDERS[kind](seed).locate_windows(half) for half in halves]
    assert np.array_equal(offsets, np.concatenate(offsets_of_halves))
    assert np.array_equal(offsets[::-1], ORDERS[kind](seed).locate_windows(samples[::-1]))


@pytest.mark.parametrize("kind", ORDERS)
def test_seeds_give_different_orders(kind):
    max_seed = RunConfig.model_fields["seed"].metadata[-1].le  # pydantic's upper bound of the key run.seed
    seeds = [*range(20), max_seed - 1, max_seed]
    orders = [tuple(ORDERS[kind](seed).locate_windows(np.arange(50))) for seed in seeds]
    assert len(set(orders)) == len(seeds)


def test_a_random_order_is_roughly_uniform():
    offsets = RandomOrder(seed=1, num_offsets=50).locate_windows(np.arange(50_000))
    assert (offsets.min(), offsets.max()) == (0, 49)
    counts = np.bincount(offsets, minlength=50)
    chi_squared = ((counts - 1000) ** 2 / 1000).sum()
    assert chi_squared < 99  # with 49 degrees of freedom, the chance of more than 99 is 0.003 %
    num_repeats = (np.diff(offsets) == 0).sum()
    assert 850 < num_repeats < 1150, "successive offsets are not independent"
    assert RandomOrder(seed=1, num_offsets=1).locate_windows(np.arange(5)).tolist() == [0] * 5
