"""A mixture's members: exact shares in every block, and numbers that count each member's samples once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_llm.data.order import Mixture

WEIGHTS = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8)


@given(WEIGHTS, st.integers(0, 2**63 - 1), st.integers(0, 10**9))
def test_each_member_counts_its_own_samples_once(weights, seed, block):
    mixture = Mixture.from_weights(weights, seed, block=100)
    members, numbers = mixture.assign(np.arange(block * 100, block * 100 + 200))
    for member, quota in enumerate(mixture.quotas):
        own = np.sort(numbers[members == member])
        assert own.tolist() == list(range(block * quota, (block + 2) * quota))


@given(WEIGHTS)
def test_shares_are_within_one_sample_of_the_weights(weights):
    """And within one more for each share so small that it is rounded up to a sample."""
    mixture = Mixture.from_weights(weights, 0)
    assert sum(mixture.quotas) == 1000
    shares = [weight / sum(weights) * 1000 for weight in weights]
    rounded_up = sum(share < 1 for share in shares)
    for quota, share in zip(mixture.quotas, shares, strict=True):
        assert quota >= 1
        assert abs(quota - share) <= 1 + rounded_up


def test_members_are_scattered_and_each_block_is_another():
    mixture = Mixture.from_weights([1, 1], 5)
    members, _ = mixture.assign(np.arange(2000))
    assert not np.array_equal(members[:1000], members[1000:])
    runs = np.diff(np.flatnonzero(np.diff(members)))
    assert runs.max() < 20


def test_the_number_alone_decides():
    mixture = Mixture.from_weights([3, 1, 1], 7)
    samples = np.arange(5000)
    members, numbers = mixture.assign(samples)
    shuffled = np.random.default_rng(0).permutation(samples)
    again = mixture.assign(shuffled)
    assert np.array_equal(again[0], members[shuffled])
    assert np.array_equal(again[1], numbers[shuffled])


@pytest.mark.parametrize("weights", [[4.0, 3.0, 3.0], [0.25, 0.5, 0.25], [1 / 3, 1 / 3, 1 / 3]])
def test_the_shares_of_ul2_are_within_a_percent(weights):
    members, _ = Mixture.from_weights(weights, 1).assign(np.arange(10_000))
    for member, weight in enumerate(weights):
        assert (members == member).mean() == pytest.approx(weight / sum(weights), abs=0.01)
