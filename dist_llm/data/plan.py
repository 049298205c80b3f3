"""Map sample numbers to windows of the sources. Pure arithmetic in constant memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_llm.data.order import Ints, Mixture
from dist_llm.data.streams import DataSource, WindowStream

Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class MixtureStage:
    """From sample `first` on, `mixture` assigns samples to sources. `num_consumed`: samples of each source consumed
    before."""

    first: int
    mixture: Mixture
    num_consumed: tuple[int, ...]

    def assign(self, samples: Ints) -> tuple[Ints, Ints]:
        """Return (source of each sample, its index among the samples of that source)."""
        if len(self.num_consumed) == 1:
            return np.zeros_like(samples), samples - self.first + self.num_consumed[0]
        sources, numbers = self.mixture.assign(samples - self.first)
        return sources, numbers + np.asarray(self.num_consumed)[sources]

    def count_consumed(self, samples: int) -> tuple[int, ...]:
        """Return how many samples of each source come before sample `samples`."""
        if len(self.num_consumed) == 1:
            return (samples - self.first + self.num_consumed[0],)
        return tuple((np.asarray(self.num_consumed) + self.mixture.count_samples(samples - self.first)).tolist())


def merge_ranges(ranges: Ranges) -> tuple[tuple[int, int], ...]:
    """Return the same numbers as ascending ranges that do not overlap."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return tuple(merged)


def build_stages(firsts: Sequence[int], mixtures: Sequence[Mixture], num_consumed: Sequence[int]) -> list[MixtureStage]:
    """Return consecutive stages. If several begin at the same sample, only the last one remains."""
    stages: list[MixtureStage] = []
    for first, mixture in zip(firsts, mixtures, strict=True):
        consumed = stages[-1].count_consumed(first) if stages else tuple(num_consumed)
        if stages and stages[-1].first == first:
            stages.pop()
        stages.append(MixtureStage(first, mixture, consumed))
    return stages


@dataclass(frozen=True)
class SamplePlan:
    """Maps sample numbers to windows, until the data changes. Numbers in `skip` are not used."""

    sources: Sequence[DataSource]
    stages: Sequence[MixtureStage]
    skip: Ranges = ()

    @property
    def streams(self) -> list[WindowStream]:
        """The window streams: for each source, one per component of the objective."""
        return [stream for source in self.sources for stream in source.streams]

    def sample_numbers(self, first: int, count: int) -> Ints:
        """Return the next `count` sample numbers from `first` on, without those in `skip`."""
        return self._apply_skips(first, np.arange(first, first + count, dtype=np.int64))

    def advance(self, first: int, count: int) -> int:
        """Return the sample number after the next `count` from `first` on."""
        return int(self._apply_skips(first, np.array([first + count]))[0]) if self.skip else first + count

    def _apply_skips(self, first: int, numbers: Ints) -> Ints:
        """Shift numbers, counted from `first` on without gaps, past the skipped ranges. Modifies `numbers`."""
        for start, end in self.skip:
            begin = max(first, start)
            numbers[numbers >= begin] += max(0, end - begin)
        return numbers

    def count_consumed(self, samples: int) -> tuple[int, ...]:
        """Return how many samples of each source come before sample `samples`, including those in `skip`."""
        started_stages = [stage for stage in self.stages if stage.first <= samples or stage is self.stages[0]]
        return started_stages[-1].count_consumed(samples)

    def locate_samples(self, samples: Ints) -> tuple[Ints, Ints]:
        """Return (index of the stream, offset in it) of each sample."""
        num_components = len(self.sources[0].streams)
        source_ids, numbers = self.assign(samples)
        if len(self.sources) * num_components == 1:
            return source_ids, self.sources[0].streams[0].order.locate(numbers)
        streams, offsets = np.empty_like(samples), np.empty_like(samples)
        for index, source in enumerate(self.sources):
            rows = np.flatnonzero(source_ids == index)
            component_ids, indices = np.zeros_like(rows), numbers[rows]
            if num_components > 1:
                component_ids, indices = source.component_mixture.assign(indices)
            for component, stream in enumerate(source.streams):
                selected = component_ids == component
                offsets[rows[selected]] = stream.order.locate(indices[selected])
            streams[rows] = index * num_components + component_ids
        return streams, offsets

    def assign(self, samples: Ints) -> tuple[Ints, Ints]:
        """Return (source of each sample, its index among the samples of that source)."""
        if len(self.stages) == 1:
            return self.stages[0].assign(samples)
        sources, numbers = np.empty_like(samples), np.empty_like(samples)
        stages = np.searchsorted([stage.first for stage in self.stages], samples, side="right") - 1
        for n in np.unique(stages).tolist():
            rows = stages == n
            sources[rows], numbers[rows] = self.stages[n].assign(samples[rows])
        return sources, numbers
