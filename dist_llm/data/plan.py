"""Map the sample numbers of a run to windows of its sources, by arithmetic in constant memory.

The samples of a run are numbered in the order of training. A mixture assigns each number to a source; a second mixture
assigns it to a component of the objective. Each (source, component) has a window stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dist_llm.data.order import Assignment, Ints, Mixture
from dist_llm.data.streams import DataSource, WindowStream

Ranges = Sequence[tuple[int, int]]  # [start, end) of sample numbers


@dataclass(frozen=True)
class MixtureStage:
    """A stage of training with constant weights of the sources."""

    first_sample: int
    mixture: Mixture  # assigns the samples from `first_sample` on to sources
    num_consumed: tuple[int, ...]  # samples of each source that earlier stages consumed

    def assign(self, samples: Ints) -> Assignment:
        """Assign the samples with these numbers to sources. The components of the result are the sources."""
        if len(self.num_consumed) == 1:
            return Assignment(np.zeros_like(samples), samples - self.first_sample + self.num_consumed[0])
        source_ids, indices = self.mixture.assign(samples - self.first_sample)
        return Assignment(source_ids, indices + np.asarray(self.num_consumed)[source_ids])

    def count_consumed(self, sample: int) -> tuple[int, ...]:
        """Return how many samples of each source come before sample number `sample`."""
        if len(self.num_consumed) == 1:
            return (sample - self.first_sample + self.num_consumed[0],)
        return tuple((np.asarray(self.num_consumed) + self.mixture.count_samples(sample - self.first_sample)).tolist())


def merge_ranges(ranges: Ranges) -> tuple[tuple[int, int], ...]:
    """Return the same numbers as ascending ranges that do not overlap."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start < merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return tuple(merged)


def build_stages(
    first_samples: Sequence[int], mixtures: Sequence[Mixture], num_consumed: Sequence[int]
) -> list[MixtureStage]:
    """Return consecutive stages. `num_consumed` has the samples of each source that were consumed before them.

    If several stages begin at the same sample, only the last one remains.
    """
    stages: list[MixtureStage] = []
    for first_sample, mixture in zip(first_samples, mixtures, strict=True):
        consumed = stages[-1].count_consumed(first_sample) if stages else tuple(num_consumed)
        if stages and stages[-1].first_sample == first_sample:
            stages.pop()
        stages.append(MixtureStage(first_sample, mixture, consumed))
    return stages


class WindowLocations(NamedTuple):
    """Where the windows of samples are. Both arrays have one element per sample."""

    stream_ids: Ints  # index in `SamplePlan.streams`
    offsets: Ints  # in this stream, as `WindowStream.read` expects them


@dataclass(frozen=True)
class SamplePlan:
    """Maps the sample numbers of one segment of a run to windows. Numbers in `skip` are not used."""

    sources: Sequence[DataSource]
    stages: Sequence[MixtureStage]
    skip: Ranges = ()

    @property
    def streams(self) -> list[WindowStream]:
        """The window streams, source by source: one per component of the objective."""
        return [stream for source in self.sources for stream in source.streams]

    def get_source_and_component(self, stream_index: int) -> tuple[DataSource, int]:
        """Return (source, index of the component of the objective) of the window stream at an index of `streams`."""
        source_index, component_index = divmod(stream_index, len(self.sources[0].streams))
        return self.sources[source_index], component_index

    def list_sample_numbers(self, first_sample: int, num_samples: int) -> Ints:
        """Return the next `num_samples` sample numbers from `first_sample` on, without those in `skip`."""
        numbers = np.arange(first_sample, first_sample + num_samples, dtype=np.int64)
        return self._apply_skips_(first_sample, numbers)

    def advance(self, first_sample: int, num_samples: int) -> int:
        """Return the sample number that follows the next `num_samples` samples from `first_sample` on."""
        if not self.skip:
            return first_sample + num_samples
        return int(self._apply_skips_(first_sample, np.array([first_sample + num_samples]))[0])

    def _apply_skips_(self, first_sample: int, numbers: Ints) -> Ints:
        """Shift numbers, counted from `first_sample` on without gaps, past the skipped ranges, in place."""
        for start, end in self.skip:
            skip_start = max(first_sample, start)
            numbers[numbers >= skip_start] += max(0, end - skip_start)
        return numbers

    def count_consumed(self, sample: int) -> tuple[int, ...]:
        """Return how many samples of each source come before sample number `sample`, including those in `skip`."""
        started_stages = [stage for stage in self.stages if stage.first_sample <= sample or stage is self.stages[0]]
        return started_stages[-1].count_consumed(sample)

    def locate_samples(self, samples: Ints) -> WindowLocations:
        """Return the location of the window of each of the samples with these numbers."""
        num_components = len(self.sources[0].streams)
        source_ids, indices_in_source = self.assign(samples)
        if len(self.sources) * num_components == 1:
            return WindowLocations(source_ids, self.sources[0].streams[0].order.locate_windows(indices_in_source))
        stream_ids, offsets = np.empty_like(samples), np.empty_like(samples)
        for source_id, source in enumerate(self.sources):
            rows = np.flatnonzero(source_ids == source_id)
            component_ids, indices = np.zeros_like(rows), indices_in_source[rows]
            if num_components > 1:
                component_ids, indices = source.component_mixture.assign(indices)
            for component_id, stream in enumerate(source.streams):
                is_component = component_ids == component_id
                offsets[rows[is_component]] = stream.order.locate_windows(indices[is_component])
            stream_ids[rows] = source_id * num_components + component_ids
        return WindowLocations(stream_ids, offsets)

    def assign(self, samples: Ints) -> Assignment:
        """Assign the samples with these numbers to sources. The components of the result are the sources."""
        if len(self.stages) == 1:
            return self.stages[0].assign(samples)
        source_ids, indices = np.empty_like(samples), np.empty_like(samples)
        stage_ids = np.searchsorted([stage.first_sample for stage in self.stages], samples, side="right") - 1
        for stage_id in np.unique(stage_ids).tolist():
            rows = stage_ids == stage_id
            source_ids[rows], indices[rows] = self.stages[stage_id].assign(samples[rows])
        return Assignment(source_ids, indices)
