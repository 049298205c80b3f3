"""Sample numbers -> windows of text: which source, which of its windows. All arithmetic, in constant memory."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_llm.data.order import Ints, Mixture
from dist_llm.data.streams import Source, Stream

Ranges = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Stage:
    """From sample `first` on, sources mix as `mixture` says; `before` samples of each came earlier."""

    first: int
    mixture: Mixture
    before: tuple[int, ...]

    def split(self, samples: Ints) -> tuple[Ints, Ints]:
        """(source of each sample, its number among that source's samples)."""
        if len(self.before) == 1:
            return np.zeros_like(samples), samples - self.first + self.before[0]
        sources, numbers = self.mixture.split(samples - self.first)
        return sources, numbers + np.asarray(self.before)[sources]

    def taken(self, samples: int) -> tuple[int, ...]:
        """How many samples of each source lie before sample `samples`."""
        if len(self.before) == 1:
            return (samples - self.first + self.before[0],)
        return tuple((np.asarray(self.before) + self.mixture.counts(samples - self.first)).tolist())


def merged(ranges: Ranges) -> tuple[tuple[int, int], ...]:
    """The same numbers in ranges that ascend and do not overlap."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found and start < found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return tuple(found)


def lay_out(firsts: Sequence[int], mixtures: Sequence[Mixture], taken: Sequence[int]) -> list[Stage]:
    """Stages one after the other; of those that begin at the same sample, the last."""
    found: list[Stage] = []
    for first, mixture in zip(firsts, mixtures, strict=True):
        before = found[-1].taken(first) if found else tuple(taken)
        if found and found[-1].first == first:
            found.pop()
        found.append(Stage(first, mixture, before))
    return found


@dataclass(frozen=True)
class Plan:
    """What each sample number means, until the data changes. Numbers in `skip` are passed over."""

    sources: Sequence[Source]
    stages: Sequence[Stage]
    skip: Ranges = ()

    @property
    def streams(self) -> list[Stream]:
        """Of every source, one for each member of the objective."""
        return [stream for source in self.sources for stream in source.streams]

    def numbers(self, first: int, count: int) -> Ints:
        """The next `count` sample numbers from `first` on."""
        return self._passed_over(first, np.arange(first, first + count, dtype=np.int64))

    def after(self, first: int, count: int) -> int:
        """The number that follows them."""
        return int(self._passed_over(first, np.array([first + count]))[0]) if self.skip else first + count

    def _passed_over(self, first: int, found: Ints) -> Ints:
        """Numbers counted from `first` on as if none were skipped -> what they are."""
        for start, end in self.skip:
            begin = max(first, start)
            found[found >= begin] += max(0, end - begin)
        return found

    def taken(self, samples: int) -> tuple[int, ...]:
        """How many samples of each source lie before sample `samples`, those in `skip` included."""
        return [stage for stage in self.stages if stage.first <= samples or stage is self.stages[0]][-1].taken(samples)

    def find(self, samples: Ints) -> tuple[Ints, Ints]:
        """(number of the stream, place in it) of each sample."""
        members = len(self.sources[0].streams)
        owners, numbers = self.split(samples)
        if len(self.sources) * members == 1:
            return owners, self.sources[0].streams[0].order.starts(numbers)
        streams, places = np.empty_like(samples), np.empty_like(samples)
        for n, source in enumerate(self.sources):
            mine = np.flatnonzero(owners == n)
            own, order = (np.zeros_like(mine), numbers[mine]) if members == 1 else source.members.split(numbers[mine])
            for member, stream in enumerate(source.streams):
                rows = own == member
                places[mine[rows]] = stream.order.starts(order[rows])
            streams[mine] = n * members + own
        return streams, places

    def split(self, samples: Ints) -> tuple[Ints, Ints]:
        """(source of each sample, its number there)."""
        if len(self.stages) == 1:
            return self.stages[0].split(samples)
        sources, numbers = np.empty_like(samples), np.empty_like(samples)
        stages = np.searchsorted([stage.first for stage in self.stages], samples, side="right") - 1
        for n in np.unique(stages).tolist():
            rows = stages == n
            sources[rows], numbers[rows] = self.stages[n].split(samples[rows])
        return sources, numbers
