"""Sample numbers -> the microbatches of one rank, made ahead in a thread."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dist_llm.config.lengths import Lengths, all_lengths
from dist_llm.config.schema import Config, DataConfig
from dist_llm.data.corpus import Corpus, Tokens
from dist_llm.data.order import Ints, Mixture, Order, Random, Shuffle
from dist_llm.errors import DataError
from dist_llm.objectives.batch import Batch
from dist_llm.objectives.build import Objective, build_objective
from dist_llm.objectives.vocabulary import Vocabulary

FOUND_AT_ONCE = 4096  # samples; the order's price is mostly one per call


def build_order(data: DataConfig, corpus: Corpus, seed: int, size: Lengths) -> Order:
    """The order that the config asks for, of windows of `size`. Raises DataError where no window fits."""
    n_windows = corpus.n_windows(size.window, size.stride)
    if n_windows < 1:
        way_out = f"lower seq_len (to make it {corpus.n_tokens} or fewer) or " if corpus.n_tokens > 1 else ""
        raise DataError(
            f"{corpus.directory}: {corpus.n_tokens} {corpus.split} tokens make no window of {size.window}, which "
            f"data.seq_len {data.seq_len} needs; {way_out}prepare more text"
        )
    if data.order == "random":
        return Random(seed, corpus.n_tokens - size.window + 1)
    return Shuffle(seed, n_windows, size.stride)


@dataclass(frozen=True)
class Stream:
    """The windows that one member of a mixture reads, in its order."""

    corpus: Corpus
    order: Order
    window: int

    def read(self, numbers: Ints) -> Tokens:
        """The windows of its samples of these numbers, [n, window]."""
        return self.corpus.read(self.order.starts(numbers), self.window)


def build_streams(config: Config, corpus: Corpus) -> list[Stream]:
    """One for each member of the objective. Raises DataError where the corpus is too short for it."""
    found = []
    for member, size in enumerate(all_lengths(config)):
        order = build_order(config.data, corpus, config.run.seed ^ member, size)
        found.append(Stream(corpus, order, size.window))
    return found


def build_loader(
    config: Config, streams: Sequence[Stream], vocabulary: Vocabulary, rank: int, ranks: int, pin: bool
) -> "Loader":
    """The loader of a resolved config's training samples."""
    mixture = Mixture.of([each.weight for each in config.objective.members], config.run.seed)
    return Loader(streams, mixture, build_objective(config, vocabulary), config.data, rank, ranks, pin)


class Loader:
    """The batches of data rank `rank` of `ranks`; the global order is the same for any `ranks`.

    A step that starts at sample n consumes [n, n + global_batch); each rank takes its slice.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        mixture: Mixture,
        objective: Objective,
        data: DataConfig,
        rank: int,
        ranks: int,
        pin: bool,
    ) -> None:
        self.streams, self.mixture, self.objective, self.pin = streams, mixture, objective, pin
        self.global_batch, self.micro_batch = data.global_batch, data.micro_batch
        self.share = data.global_batch // ranks
        self.offset = rank * self.share
        self.prefetch = data.prefetch
        self._pool = ThreadPoolExecutor(1, "loader") if data.prefetch else None
        self._ahead: dict[int, Future[list[Batch]]] = {}
        self._found, self._found_first = np.empty((0, self.share), np.int64), 0

    def samples(self, first: int) -> npt.NDArray[np.int64]:
        """The sample numbers of this rank in the step that starts at sample `first`."""
        return np.arange(first + self.offset, first + self.offset + self.share, dtype=np.int64)

    def batches(self, first: int) -> list[Batch]:
        """The microbatches of the step that starts at sample `first`; starts on the next ones."""
        if self._pool is None:
            return self._make(first)
        for step in range(self.prefetch + 1):
            ahead = first + step * self.global_batch
            if ahead not in self._ahead:
                self._ahead[ahead] = self._pool.submit(self._make, ahead)
        return self._ahead.pop(first).result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _make(self, first: int) -> list[Batch]:
        samples = self.samples(first)
        windows, members = self._read(samples)
        batches = []
        for start in range(0, len(samples), self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            batches.append(self.objective(windows[rows], samples[rows], members[rows]))
        return [batch.pin() for batch in batches] if self.pin else batches

    def _read(self, samples: Ints) -> tuple[Sequence[Tokens] | Tokens, list[int]]:
        """The window of each sample, and whose it is."""
        if len(self.streams) == 1:
            (stream,) = self.streams
            return stream.corpus.read(self._starts(int(samples[0]) - self.offset), stream.window), [0] * len(samples)
        members, numbers = self.mixture.split(samples)
        windows: list[Tokens] = [np.empty(0)] * len(samples)
        for member, stream in enumerate(self.streams):
            places = np.flatnonzero(members == member)
            rows = stream.corpus.read(stream.order.starts(numbers[places]), stream.window)
            for place, window in zip(places.tolist(), rows, strict=True):
                windows[place] = window
        return windows, members.tolist()

    def _starts(self, first: int) -> Ints:
        """Where the windows of the step that starts at sample `first` begin, found for some steps at a time."""
        step, off_beat = divmod(first - self._found_first, self.global_batch)
        if off_beat or not 0 <= step < len(self._found):
            steps = max(1, FOUND_AT_ONCE // self.share)
            samples = self.samples(first) + self.global_batch * np.arange(steps)[:, None]
            starts = self.streams[0].order.starts(samples.ravel())
            self._found, self._found_first, step = starts.reshape(steps, -1), first, 0
        return self._found[step]
