"""Brute force over mixtures, stages, skips, world sizes, kills and batch sizes: all read one order of samples."""

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

WINDOW = 5

settings.register_profile("data", deadline=None)
settings.load_profile("data")


@st.composite
def plans(draw):
    """Draw a plan of 1 to 3 sources with 1 or 2 components each, in 1 to 3 stages, with skipped ranges."""
    n_sources, n_components = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    seed = draw(st.integers(0, 2**63 - 1))
    sources = []
    for number in range(n_sources):
        streams = tuple(
            WindowStream(None, ShuffledOrder(seed ^ number * 7 + component, draw(st.integers(1, 40)), WINDOW), WINDOW)
            for component in range(n_components)
        )
        component_mixture = Mixture(
            seed ^ number, tuple(draw(st.lists(st.integers(1, 4), min_size=n_components, max_size=n_components)))
        )
        sources.append(DataSource(str(number), None, streams, component_mixture))
    firsts = [0, *sorted(draw(st.lists(st.integers(1, 120), max_size=2)))]
    quotas = st.lists(st.integers(0, 5), min_size=n_sources, max_size=n_sources).filter(any)
    mixtures = [Mixture(seed ^ first, tuple(draw(quotas))) for first in firsts]
    edges = sorted(draw(st.lists(st.integers(0, 150), max_size=4, unique=True)))
    skip = tuple((edges[n], edges[n + 1]) for n in range(0, len(edges) - 1, 2))
    return SamplePlan(sources, build_stages(firsts, mixtures, [0] * n_sources), skip)


def locate_one_by_one(plan, samples):
    """Return (stream, offset) of each sample, located one at a time."""
    return [tuple(int(array[0]) for array in plan.locate_samples(np.array([sample]))) for sample in samples]


def count_unskipped(plan, count):
    """Return the first `count` sample numbers that are not skipped, by counting."""
    skipped = {n for start, end in plan.skip for n in range(start, end)}
    return [n for n in range(count + len(skipped)) if n not in skipped][:count]


class NumbersObjective:
    """An objective that ignores the windows."""

    components = (None,)

    def __call__(self, windows, samples, component_ids):
        return None


@given(
    plan=plans(),
    runs=st.lists(st.tuples(st.integers(1, 16), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5),
)
@patch("dist_llm.data.loader.LOOKUP_SAMPLES", 8)
def test_resumes_with_any_dp_and_batch_size_read_one_order(plan, runs):
    """Runs of (ranks, sequences per rank, steps).

    Each run resumes where the previous one was killed, and may repeat a step.
    """
    read, first = [], 0
    for dp_size, rank_batch, steps in runs:
        data = DataConfig(seq_len=WINDOW - 1, global_batch=dp_size * rank_batch, micro_batch=1, prefetch=0)
        loaders = [Loader(plan, NumbersObjective(), data, dp_rank, dp_size, pin=False) for dp_rank in range(dp_size)]
        for _ in range(steps):
            located = [loader._locate_samples(first) for loader in loaders]
            for samples, streams, offsets in located:
                read += list(zip(samples.tolist(), streams.tolist(), offsets.tolist(), strict=True))
            # A resumed run reads the samples after the checkpoint again: they are the same.
            repeated = Loader(plan, NumbersObjective(), data, 0, 1, pin=False)._locate_samples(first)
            assert read[-dp_size * rank_batch :] == list(zip(*(array.tolist() for array in repeated), strict=True))
            first = loaders[0].advance(first)
            assert all(loader.advance(loader.plan.advance(first, 0)) == loaders[0].advance(first) for loader in loaders)
    numbers = count_unskipped(plan, len(read))
    assert [sample for sample, _, _ in read] == numbers, "each sample once, in order"
    assert [(stream, offset) for _, stream, offset in read] == locate_one_by_one(plan, numbers)


@given(plan=plans(), count=st.integers(1, 200), more=st.integers(1, 200))
def test_a_longer_run_has_the_shorter_runs_prefix(plan, count, more):
    shorter, longer = (np.stack(plan.locate_samples(np.arange(n))) for n in (count, count + more))
    assert np.array_equal(shorter, longer[:, :count])


@given(plan=plans())
def test_stages_keep_quotas_and_number_samples_once(plan):
    """Quotas are exact over full blocks. A source's samples are numbered consecutively across stages."""
    ends = [stage.first_sample for stage in plan.stages[1:]] + [
        plan.stages[-1].first_sample + 2 * sum(plan.stages[-1].mixture.quotas)
    ]
    expected = [0] * len(plan.sources)
    samples_seen = Counter()
    for stage, end in zip(plan.stages, ends, strict=True):
        assert stage.num_consumed == tuple(expected)
        block = sum(stage.mixture.quotas)
        source_ids, numbers = plan.assign(np.arange(stage.first_sample, end))
        samples_seen.update(zip(source_ids.tolist(), numbers.tolist(), strict=True))
        if len(plan.sources) > 1:
            for start in range(0, len(source_ids) - block + 1, block):
                counts = np.bincount(source_ids[start : start + block], minlength=len(plan.sources))
                assert tuple(counts) == stage.mixture.quotas
        for source, before in enumerate(stage.num_consumed):
            indices = numbers[source_ids == source]
            assert indices.tolist() == list(range(before, stage.count_consumed(end)[source]))
        expected = list(stage.count_consumed(end))
    assert set(samples_seen.values()) == {1}


@given(plan=plans())
def test_full_epochs_visit_each_window_equally_often(plan):
    """The first k * num_windows samples of a stream visit each window k times."""
    for source in plan.sources:
        numbers = np.arange(4 * 40 * sum(source.component_mixture.quotas))
        component_ids, indices = (
            source.component_mixture.assign(numbers) if len(source.streams) > 1 else (np.zeros_like(numbers), numbers)
        )
        for component, stream in enumerate(source.streams):
            sorted_indices = np.sort(indices[component_ids == component])
            assert np.array_equal(sorted_indices, np.arange(len(sorted_indices)))
            windows = stream.order.num_windows
            epochs = len(sorted_indices) // windows
            visits = Counter(stream.order.locate_windows(sorted_indices[: epochs * windows]).tolist())
            assert visits == dict.fromkeys(range(0, windows * WINDOW, WINDOW), epochs)


@given(plan=plans(), first=st.integers(0, 160), count=st.integers(1, 60))
def test_skipped_numbers_are_not_used(plan, first, count):
    skipped = {n for start, end in plan.skip for n in range(start, end)}
    unskipped = [n for n in range(first, first + count + len(skipped)) if n not in skipped]
    assert plan.list_sample_numbers(first, count).tolist() == unskipped[:count]
    assert plan.advance(first, count) == next(n for n in range(unskipped[count - 1] + 1, 10**6) if n not in skipped)


def test_a_source_with_weight_0_is_never_used_and_blocks_are_shuffled():
    mixture = Mixture.from_weights([0.7, 0.0, 0.3], seed=5, block_samples=10_000)
    assert mixture.quotas == (7000, 0, 3000)
    source_ids, _ = mixture.assign(np.arange(10_000))
    assert np.bincount(source_ids, minlength=3).tolist() == [7000, 0, 3000]
    for twentieth in np.split(source_ids, 20):  # shuffled: each twentieth has nearly the same fraction
        assert abs((twentieth == 0).mean() - 0.7) < 0.09
    for count in (0, 3, 10_000, 25_000):
        first_ids, _ = mixture.assign(np.arange(count))
        assert mixture.count_samples(count).tolist() == np.bincount(first_ids, minlength=3).tolist()


def test_a_sources_order_does_not_depend_on_the_weights():
    """Sample n of a source is the same window under any weights, which only decide when it comes."""
    streams = {name: WindowStream(None, ShuffledOrder(len(name), 9, WINDOW), WINDOW) for name in ("a", "bb")}
    mixture = Mixture(0, (1,))
    sources = [DataSource(name, SimpleNamespace(), (stream,), mixture) for name, stream in streams.items()]

    equal_weights = SamplePlan(sources, build_stages([0], [Mixture(1, (5, 5))], [0, 0]))
    low_weight = SamplePlan(sources, build_stages([0], [Mixture(2, (1, 9))], [0, 0]))
    for plan, samples in ((equal_weights, 20), (low_weight, 100)):  # ten of source a
        source_ids, offsets = plan.locate_samples(np.arange(samples))
        assert sorted(offsets[source_ids == 0].tolist()) == sorted(
            streams["a"].order.locate_windows(np.arange(10)).tolist()
        )


def test_last_of_stages_at_the_same_sample_remains():
    stages = build_stages([0, 6, 6, 9], [Mixture(n, (1, 2)) for n in range(4)], [3, 4])
    assert [(stage.first_sample, stage.mixture.seed) for stage in stages] == [(0, 0), (6, 2), (9, 3)]
    assert stages[0].num_consumed == (3, 4)
    assert all(
        sum(after.num_consumed) - sum(before.num_consumed) == after.first_sample - before.first_sample
        for before, after in pairwise(stages)
    )


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 15)), max_size=12))
def test_merge_ranges_merges_overlaps(pairs):
    ranges = merge_ranges([(start, start + length) for start, length in pairs])
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))
    covered = {number for start, end in ranges for number in range(start, end)}
    assert covered == {number for start, length in pairs for number in range(start, start + length)}
