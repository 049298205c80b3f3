"""Brute force over mixtures, stages, skips, world sizes, kills and batch sizes: the same samples in the same order."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.config.schema import DataConfig
from dist_llm.data.loader import Loader
from dist_llm.data.order import Mixture, Shuffle
from dist_llm.data.plan import SamplePlan, build_stages, merge_ranges
from dist_llm.data.streams import DataSource, WindowStream

WINDOW = 5

settings.register_profile("data", deadline=None)
settings.load_profile("data")


@st.composite
def plans(draw):
    """1 to 3 sources with 1 or 2 members each, in 1 to 3 stages; and what is skipped."""
    n_sources, n_members = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    seed = draw(st.integers(0, 2**63 - 1))
    sources = []
    for number in range(n_sources):
        streams = tuple(
            WindowStream(None, Shuffle(seed ^ number * 7 + member, draw(st.integers(1, 40)), WINDOW), WINDOW)
            for member in range(n_members)
        )
        members = Mixture(
            seed ^ number, tuple(draw(st.lists(st.integers(1, 4), min_size=n_members, max_size=n_members)))
        )
        sources.append(DataSource(str(number), None, streams, members))
    firsts = [0, *sorted(draw(st.lists(st.integers(1, 120), max_size=2)))]
    some = st.lists(st.integers(0, 5), min_size=n_sources, max_size=n_sources).filter(any)
    mixtures = [Mixture(seed ^ first, tuple(draw(some))) for first in firsts]
    edges = sorted(draw(st.lists(st.integers(0, 150), max_size=4, unique=True)))
    skip = tuple((edges[n], edges[n + 1]) for n in range(0, len(edges) - 1, 2))
    return SamplePlan(sources, build_stages(firsts, mixtures, [0] * n_sources), skip)


def slowly(plan, samples):
    """(stream, place) of each sample, one after the other: what `find` says of many at once."""
    return [tuple(int(each[0]) for each in plan.locate_samples(np.array([sample]))) for sample in samples]


def counted(plan, count):
    """The first `count` sample numbers that are not skipped, counted by hand."""
    skipped = {n for start, end in plan.skip for n in range(start, end)}
    return [n for n in range(count + len(skipped)) if n not in skipped][:count]


class Numbers:
    """An objective that keeps the sample numbers alone."""

    members = (None,)

    def __call__(self, windows, samples, owners):
        return None


@given(
    plan=plans(),
    runs=st.lists(st.tuples(st.integers(1, 16), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5),
)
@patch("dist_llm.data.loader.LOOKUP_SAMPLES", 8)
def test_any_worlds_kills_and_batches_read_one_order(plan, runs):
    """Runs of (ranks, sequences per rank, steps), each resumed where the last was killed, perhaps mid-way again."""
    read, first = [], 0
    for ranks, share, steps in runs:
        data = DataConfig(seq_len=WINDOW - 1, global_batch=ranks * share, micro_batch=1, prefetch=0)
        team = [Loader(plan, Numbers(), data, rank, ranks, pin=False) for rank in range(ranks)]
        for _ in range(steps):
            found = [loader._locate_samples(first) for loader in team]
            for samples, streams, places in found:
                read += list(zip(samples.tolist(), streams.tolist(), places.tolist(), strict=True))
            # What a killed run read after its checkpoint, another reads again, and all the same.
            again = Loader(plan, Numbers(), data, 0, 1, pin=False)._locate_samples(first)
            assert read[-ranks * share :] == list(zip(*(each.tolist() for each in again), strict=True))
            first = team[0].advance(first)
            assert all(loader.advance(loader.plan.advance(first, 0)) == team[0].advance(first) for loader in team)
    numbers = counted(plan, len(read))
    assert [sample for sample, _, _ in read] == numbers, "none twice, none left out, in order"
    assert [(stream, place) for _, stream, place in read] == slowly(plan, numbers)


@given(plan=plans(), count=st.integers(1, 200), more=st.integers(1, 200))
def test_a_longer_run_keeps_the_shorter_ones_prefix(plan, count, more):
    shorter, longer = (np.stack(plan.locate_samples(np.arange(n))) for n in (count, count + more))
    assert np.array_equal(shorter, longer[:, :count])


@given(plan=plans())
def test_each_stage_gives_each_source_its_quota_and_no_sample_twice(plan):
    """Over whole blocks shares are exact; a source's samples are numbered without a gap from stage to stage."""
    ends = [stage.first for stage in plan.stages[1:]] + [
        plan.stages[-1].first + 2 * sum(plan.stages[-1].mixture.quotas)
    ]
    expected = [0] * len(plan.sources)
    everything = Counter()
    for stage, end in zip(plan.stages, ends, strict=True):
        assert stage.num_consumed == tuple(expected)
        block = sum(stage.mixture.quotas)
        owners, numbers = plan.assign(np.arange(stage.first, end))
        everything.update(zip(owners.tolist(), numbers.tolist(), strict=True))
        if len(plan.sources) > 1:
            for start in range(0, len(owners) - block + 1, block):
                found = np.bincount(owners[start : start + block], minlength=len(plan.sources))
                assert tuple(found) == stage.mixture.quotas
        for source, before in enumerate(stage.num_consumed):
            mine = numbers[owners == source]
            assert mine.tolist() == list(range(before, stage.count_consumed(end)[source]))
        expected = list(stage.count_consumed(end))
    assert set(everything.values()) == {1}


@given(plan=plans())
def test_over_whole_epochs_each_window_of_a_source_comes_equally_often(plan):
    """The expected multiset: of a stream's first k * n_windows samples, each window k times."""
    for source in plan.sources:
        numbers = np.arange(4 * 40 * sum(source.component_mixture.quotas))
        owners, own = (
            source.component_mixture.assign(numbers) if len(source.streams) > 1 else (np.zeros_like(numbers), numbers)
        )
        for member, stream in enumerate(source.streams):
            mine = np.sort(own[owners == member])
            assert np.array_equal(mine, np.arange(len(mine)))
            windows = stream.order.n_windows
            epochs = len(mine) // windows
            visits = Counter(stream.order.locate(mine[: epochs * windows]).tolist())
            assert visits == dict.fromkeys(range(0, windows * WINDOW, WINDOW), epochs)


@given(plan=plans(), first=st.integers(0, 160), count=st.integers(1, 60))
def test_skipped_numbers_are_passed_over(plan, first, count):
    skipped = {n for start, end in plan.skip for n in range(start, end)}
    want = [n for n in range(first, first + count + len(skipped)) if n not in skipped]
    assert plan.sample_numbers(first, count).tolist() == want[:count]
    assert plan.advance(first, count) == next(n for n in range(want[count - 1] + 1, 10**6) if n not in skipped)


def test_a_source_without_weight_is_never_drawn_and_shares_are_near_even_within_a_block():
    mixture = Mixture.from_weights([0.7, 0.0, 0.3], seed=5, block=10_000)
    assert mixture.quotas == (7000, 0, 3000)
    members, _ = mixture.assign(np.arange(10_000))
    assert np.bincount(members, minlength=3).tolist() == [7000, 0, 3000]
    for part in np.split(members, 20):  # scattered: each twentieth has its share, but for chance
        assert abs((part == 0).mean() - 0.7) < 0.09
    for count in (0, 3, 10_000, 25_000):
        owners, _ = mixture.assign(np.arange(count))
        assert mixture.count_samples(count).tolist() == np.bincount(owners, minlength=3).tolist()


def test_a_source_keeps_its_order_whoever_else_is_there():
    """Its n-th sample is the same window under any weights: those only say when it comes."""
    streams = {name: WindowStream(None, Shuffle(len(name), 9, WINDOW), WINDOW) for name in ("a", "bb")}
    one = Mixture(0, (1,))
    sources = [DataSource(name, SimpleNamespace(), (stream,), one) for name, stream in streams.items()]

    even = SamplePlan(sources, build_stages([0], [Mixture(1, (5, 5))], [0, 0]))
    rare = SamplePlan(sources, build_stages([0], [Mixture(2, (1, 9))], [0, 0]))
    for plan, samples in ((even, 20), (rare, 100)):  # ten of source a
        owners, places = plan.locate_samples(np.arange(samples))
        assert sorted(places[owners == 0].tolist()) == sorted(streams["a"].order.locate(np.arange(10)).tolist())


def test_stages_that_begin_at_the_same_sample_are_the_last_of_them():
    stages = build_stages([0, 6, 6, 9], [Mixture(n, (1, 2)) for n in range(4)], [3, 4])
    assert [(stage.first, stage.mixture.seed) for stage in stages] == [(0, 0), (6, 2), (9, 3)]
    assert stages[0].num_consumed == (3, 4)
    assert all(
        sum(after.num_consumed) - sum(before.num_consumed) == after.first - before.first
        for before, after in pairwise(stages)
    )


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 15)), max_size=12))
def test_ranges_that_overlap_are_merged(pairs):
    ranges = merge_ranges([(start, start + length) for start, length in pairs])
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))
    covered = {number for start, end in ranges for number in range(start, end)}
    assert covered == {number for start, length in pairs for number in range(start, start + length)}
