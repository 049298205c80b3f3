"""A sample plan gives one order of samples, compared with brute force.

The order does not depend on the number of ranks, the batch size or resumes. The tests draw mixtures, stages and skips.
"""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.data_sections import DataConfig
from dist_llm.data.loader import Loader
from dist_llm.data.order import Mixture, ShuffledOrder
from dist_llm.data.plan import SamplePlan, build_stages, merge_ranges
from dist_llm.data.streams import DataSource, WindowStream

WINDOW = 5  # tokens

settings.register_profile("data", deadline=None)
settings.load_profile("data")


@st.composite
def draw_plans(draw):
    """Draw a plan of 1 to 3 sources with 1 or 2 components each, in 1 to 3 stages, with skipped ranges."""
    num_sources, num_components = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    seed = draw(st.integers(0, 2**63 - 1))
    sources = []
    for source_index in range(num_sources):
        streams = tuple(
            WindowStream(
                corpus=None,
                order=ShuffledOrder(seed ^ source_index * 7 + component, draw(st.integers(1, 40)), WINDOW),
                window_tokens=WINDOW,
            )
            for component in range(num_components)
        )
        component_mixture = Mixture(
            seed ^ source_index,
            tuple(draw(st.lists(st.integers(1, 4), min_size=num_components, max_size=num_components))),
        )
        sources.append(DataSource(str(source_index), corpus=None, streams=streams, component_mixture=component_mixture))
    first_samples = [0, *sorted(draw(st.lists(st.integers(1, 120), max_size=2)))]
    quotas = st.lists(st.integers(0, 5), min_size=num_sources, max_size=num_sources).filter(any)
    mixtures = [Mixture(seed ^ first, tuple(draw(quotas))) for first in first_samples]
    edges = sorted(draw(st.lists(st.integers(0, 150), max_size=4, unique=True)))
    skip = tuple((edges[index], edges[index + 1]) for index in range(0, len(edges) - 1, 2))
    return SamplePlan(sources, build_stages(first_samples, mixtures, [0] * num_sources), skip)


def locate_one_by_one(plan, samples):
    """Return (stream, offset) of each sample, located one at a time."""
    return [tuple(int(array[0]) for array in plan.locate_samples(np.array([sample]))) for sample in samples]


def list_unskipped(plan, count):
    """Return the first `count` sample numbers that are not skipped."""
    skipped = {number for start, end in plan.skip for number in range(start, end)}
    return [number for number in range(count + len(skipped)) if number not in skipped][:count]


class NoBatchObjective:
    """A substitute of Objective that builds no batch. The tests only locate samples."""

    components = (None,)

    def __call__(self, windows, samples, component_ids):
        return None


@given(
    plan=draw_plans(),
    runs=st.lists(st.tuples(st.integers(1, 16), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5),
)
@patch("dist_llm.data.loader.LOOKUP_SAMPLES", 8)
def test_resumes_with_any_dp_and_batch_size_read_one_order(plan, runs):
    """`runs` has (number of ranks, sequences per rank, number of steps) of successive runs that resume each other."""
    samples_read, first_sample = [], 0  # samples_read: (sample, stream, offset)
    for dp_size, local_batch, num_steps in runs:
        data = DataConfig(seq_len=WINDOW - 1, global_batch=dp_size * local_batch, micro_batch=1, prefetch=0)
        loaders = [Loader(plan, NoBatchObjective(), data, dp_rank, dp_size, pin=False) for dp_rank in range(dp_size)]
        for _ in range(num_steps):
            for samples, streams, offsets in [loader._locate_samples(first_sample) for loader in loaders]:
                samples_read += list(zip(samples.tolist(), streams.tolist(), offsets.tolist(), strict=True))
            # A resumed run reads the samples after the checkpoint again: they are the same.
            resumed_loader = Loader(plan, NoBatchObjective(), data, dp_rank=0, dp_size=1, pin=False)
            repeated = resumed_loader._locate_samples(first_sample)
            repeated_samples = list(zip(*(array.tolist() for array in repeated), strict=True))
            assert samples_read[-dp_size * local_batch :] == repeated_samples
            first_sample = loaders[0].advance(first_sample)
            next_first_sample = loaders[0].advance(first_sample)
            assert all(loader.advance(loader.plan.advance(first_sample, 0)) == next_first_sample for loader in loaders)
    expected_samples = list_unskipped(plan, len(samples_read))
    assert [sample for sample, _, _ in samples_read] == expected_samples, "samples are repeated or not in order"
    assert [(stream, offset) for _, stream, offset in samples_read] == locate_one_by_one(plan, expected_samples)


@given(plan=draw_plans(), num_samples=st.integers(1, 200), num_more=st.integers(1, 200))
def test_a_longer_run_starts_like_a_shorter_run(plan, num_samples, num_more):
    shorter, longer = (
        np.stack(plan.locate_samples(np.arange(count))) for count in (num_samples, num_samples + num_more)
    )
    assert np.array_equal(shorter, longer[:, :num_samples])


@given(plan=draw_plans())
def test_stages_keep_quotas_and_number_samples_once(plan):
    """Quotas are exact over full blocks. A source's samples are numbered consecutively across stages."""
    ends = [stage.first_sample for stage in plan.stages[1:]] + [
        plan.stages[-1].first_sample + 2 * sum(plan.stages[-1].mixture.quotas)
    ]
    expected_consumed = [0] * len(plan.sources)
    visits = Counter()  # by (source, index of the sample within the source)
    for stage, end in zip(plan.stages, ends, strict=True):
        assert stage.num_consumed == tuple(expected_consumed)
        block_samples = sum(stage.mixture.quotas)
        source_ids, indices = plan.assign(np.arange(stage.first_sample, end))
        visits.update(zip(source_ids.tolist(), indices.tolist(), strict=True))
        if len(plan.sources) > 1:
            for start in range(0, len(source_ids) - block_samples + 1, block_samples):
                counts = np.bincount(source_ids[start : start + block_samples], minlength=len(plan.sources))
                assert tuple(counts) == stage.mixture.quotas
        for source, num_before in enumerate(stage.num_consumed):
            source_indices = indices[source_ids == source]
            assert source_indices.tolist() == list(range(num_before, stage.count_consumed(end)[source]))
        expected_consumed = list(stage.count_consumed(end))
    assert set(visits.values()) == {1}


@given(plan=draw_plans())
def test_full_epochs_visit_each_window_equally_often(plan):
    """The first k * num_windows samples of a stream visit each window k times."""
    for source in plan.sources:
        samples = np.arange(4 * 40 * sum(source.component_mixture.quotas))  # a stream has at most 40 windows
        component_ids, indices = (
            source.component_mixture.assign(samples) if len(source.streams) > 1 else (np.zeros_like(samples), samples)
        )
        for component, stream in enumerate(source.streams):
            sorted_indices = np.sort(indices[component_ids == component])
            assert np.array_equal(sorted_indices, np.arange(len(sorted_indices)))
            num_windows = stream.order.num_windows
            num_epochs = len(sorted_indices) // num_windows
            visits = Counter(stream.order.locate_windows(sorted_indices[: num_epochs * num_windows]).tolist())
            assert visits == dict.fromkeys(range(0, num_windows * WINDOW, WINDOW), num_epochs)


@given(plan=draw_plans(), first=st.integers(0, 160), count=st.integers(1, 60))
def test_skipped_samples_are_not_used(plan, first, count):
    skipped = {number for start, end in plan.skip for number in range(start, end)}
    unskipped = [number for number in range(first, first + count + len(skipped)) if number not in skipped]
    assert plan.list_sample_numbers(first, count).tolist() == unskipped[:count]
    assert plan.advance(first, count) == next(
        number for number in range(unskipped[count - 1] + 1, 10**6) if number not in skipped
    )


def test_a_block_is_shuffled_and_has_no_sample_of_weight_0():
    mixture = Mixture.from_weights([0.7, 0.0, 0.3], seed=5, block_samples=10_000)
    assert mixture.quotas == (7000, 0, 3000)
    source_ids, _ = mixture.assign(np.arange(10_000))
    assert np.bincount(source_ids, minlength=3).tolist() == [7000, 0, 3000]
    for part_ids in np.split(source_ids, 20):  # in a shuffled block each part has nearly the same fraction
        assert abs((part_ids == 0).mean() - 0.7) < 0.09
    for count in (0, 3, 10_000, 25_000):
        first_ids, _ = mixture.assign(np.arange(count))
        assert mixture.count_samples(count).tolist() == np.bincount(first_ids, minlength=3).tolist()


def test_the_order_within_a_source_does_not_depend_on_the_weights():
    """Sample n of a source is the same window under any weights. The weights only decide at which step it is read."""
    streams = {
        name: WindowStream(
            corpus=None, order=ShuffledOrder(len(name), num_windows=9, stride=WINDOW), window_tokens=WINDOW
        )
        for name in ("a", "bb")
    }
    mixture = Mixture(0, quotas=(1,))
    sources = [
        DataSource(name, corpus=SimpleNamespace(), streams=(stream,), component_mixture=mixture)
        for name, stream in streams.items()
    ]

    equal_weights = SamplePlan(sources, build_stages([0], [Mixture(1, (5, 5))], [0, 0]))
    low_weight = SamplePlan(sources, build_stages([0], [Mixture(2, (1, 9))], [0, 0]))
    for plan, num_samples in ((equal_weights, 20), (low_weight, 100)):  # these have ten samples of source a
        source_ids, offsets = plan.locate_samples(np.arange(num_samples))
        assert sorted(offsets[source_ids == 0].tolist()) == sorted(
            streams["a"].order.locate_windows(np.arange(10)).tolist()
        )


def test_build_stages_keeps_the_last_of_several_stages_at_one_sample():
    stages = build_stages([0, 6, 6, 9], [Mixture(seed, (1, 2)) for seed in range(4)], [3, 4])
    assert [(stage.first_sample, stage.mixture.seed) for stage in stages] == [(0, 0), (6, 2), (9, 3)]
    assert stages[0].num_consumed == (3, 4)
    assert all(
        sum(after.num_consumed) - sum(before.num_consumed) == after.first_sample - before.first_sample
        for before, after in pairwise(stages)
    )


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 15)), max_size=12))
def test_merge_ranges_merges_overlaps(pairs):
    ranges = merge_ranges([(start, start + length) for start, length in pairs])
    assert all(previous[1] <= following[0] for previous, following in pairwise(ranges))
    covered = {number for start, end in ranges for number in range(start, end)}
    assert covered == {number for start, length in pairs for number in range(start, start + length)}
