"""Mixture gives each component its exact quota per block, and numbers the samples of a component consecutively."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_llm.data.order import Mixture

WEIGHTS = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8)


@given(WEIGHTS, st.integers(0, 2**63 - 1), st.integers(0, 10**9))
def test_each_component_numbers_its_samples_consecutively(weights, seed, block):
    mixture = Mixture.from_weights(weights, seed, block_samples=100)
    component_ids, indices = mixture.assign(np.arange(block * 100, block * 100 + 200))  # two blocks
    for component, quota in enumerate(mixture.quotas):
        component_indices = np.sort(indices[component_ids == component])
        assert component_indices.tolist() == list(range(block * quota, (block + 2) * quota))


@given(WEIGHTS)
def test_quotas_are_within_one_sample_of_the_weights(weights):
    """The tolerance grows by one for each quota that is rounded up to one sample."""
    mixture = Mixture.from_weights(weights, seed=0)
    assert sum(mixture.quotas) == 1000
    exact_quotas = [weight / sum(weights) * 1000 for weight in weights]
    num_rounded_up = sum(exact_quota < 1 for exact_quota in exact_quotas)
    for quota, exact_quota in zip(mixture.quotas, exact_quotas, strict=True):
        assert quota >= 1
        assert abs(quota - exact_quota) <= 1 + num_rounded_up


def test_components_are_shuffled_differently_in_each_block():
    mixture = Mixture.from_weights([1, 1], seed=5)
    component_ids, _ = mixture.assign(np.arange(2000))
    assert not np.array_equal(component_ids[:1000], component_ids[1000:])
    run_lengths = np.diff(np.flatnonzero(np.diff(component_ids)))  # successive samples of one component
    assert run_lengths.max() < 20


def test_assign_depends_only_on_the_sample_number():
    mixture = Mixture.from_weights([3, 1, 1], seed=7)
    samples = np.arange(5000)
    component_ids, indices = mixture.assign(samples)
    shuffled_samples = np.random.default_rng(0).permutation(samples)
    shuffled_component_ids, shuffled_indices = mixture.assign(shuffled_samples)
    assert np.array_equal(shuffled_component_ids, component_ids[shuffled_samples])
    assert np.array_equal(shuffled_indices, indices[shuffled_samples])


@pytest.mark.parametrize("weights", [[4.0, 3.0, 3.0], [0.25, 0.5, 0.25], [1 / 3, 1 / 3, 1 / 3]])
def test_fractions_of_components_are_within_one_percent(weights):
    component_ids, _ = Mixture.from_weights(weights, seed=1).assign(np.arange(10_000))
    for component, weight in enumerate(weights):
        assert (component_ids == component).mean() == pytest.approx(weight / sum(weights), abs=0.01)
