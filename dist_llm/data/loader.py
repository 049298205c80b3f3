"""Sample numbers -> the microbatches of one rank, made ahead in a thread."""

from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import replace

import numpy as np
import torch

from dist_llm.config.schema import Config, DataConfig
from dist_llm.data.order import Ints
from dist_llm.data.plan import Plan
from dist_llm.data.streams import hides_prompts
from dist_llm.objectives.batch import Batch
from dist_llm.objectives.build_objective import Objective, Windows, build_objective
from dist_llm.objectives.objective_vocabulary import Vocabulary

FOUND_AT_ONCE = 4096  # samples; the order's price is mostly one per call


def build_loader(config: Config, plan: Plan, vocabulary: Vocabulary, rank: int, ranks: int, pin: bool) -> "Loader":
    """The loader of a resolved config's training samples."""
    prompts = hides_prompts(config.data, [source.corpus for source in plan.sources])
    return Loader(plan, build_objective(config, vocabulary, prompts), config.data, rank, ranks, pin)


class Loader:
    """The batches of data rank `rank` of `ranks`; the global order is the same for any `ranks`.

    A step that starts at sample n consumes the next global_batch numbers; each rank takes its slice.
    """

    def __init__(self, plan: Plan, objective: Objective, data: DataConfig, rank: int, ranks: int, pin: bool) -> None:
        self.plan, self.objective, self.pin = plan, objective, pin
        self.streams = plan.streams
        self.global_batch, self.micro_batch = data.global_batch, data.micro_batch
        self.share = data.global_batch // ranks
        self.offset = rank * self.share
        self.prefetch = data.prefetch
        self._pool = ThreadPoolExecutor(1, "loader") if data.prefetch else None
        self._ahead: dict[int, Future[list[Batch]]] = {}
        self._found: dict[int, tuple[Ints, Ints, Ints]] = {}  # of each step, by its first sample

    def samples(self, first: int) -> Ints:
        """The sample numbers of this rank in the step that starts at sample `first`."""
        return self.plan.numbers(first, self.global_batch)[self.offset : self.offset + self.share]

    def after(self, first: int) -> int:
        """Where the step after the one that starts at sample `first` does."""
        return self.plan.after(first, self.global_batch)

    def after_steps(self, first: int, steps: int) -> int:
        """Where the step `steps` after the one that starts at sample `first` does."""
        for _ in range(steps):
            first = self.after(first)
        return first

    def batches(self, first: int) -> list[Batch]:
        """The microbatches of the step that starts at sample `first`; starts on the next ones."""
        if self._pool is None:
            return self._make(first)
        ahead = first
        for _ in range(self.prefetch + 1):
            if ahead not in self._ahead:
                self._ahead[ahead] = self._pool.submit(self._make, ahead)
            ahead = self.after(ahead)
        return self._ahead.pop(first).result()

    def batches_of(self, rank: int, first: int) -> list[Batch]:
        """The microbatches that data rank `rank` has in that step."""
        loader = copy(self)
        loader.offset, loader._found = rank * self.share, {}
        # In the thread that reads ahead: corpora are not to be read by two at once.
        return loader._make(first) if self._pool is None else self._pool.submit(loader._make, first).result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _make(self, first: int) -> list[Batch]:
        samples, streams, places = self._find(first)
        windows = self._read(streams, places)
        members = len(self.objective.components)
        owners = (streams % members).tolist() if members > 1 else ()
        batches = []
        for start in range(0, len(samples), self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            batch = self.objective(windows[rows], samples[rows], owners[rows])
            if len(self.plan.sources) > 1:
                batch = replace(batch, source_ids_B=torch.from_numpy(streams[rows] // members))
            batches.append(batch)
        return [batch.pin_memory() for batch in batches] if self.pin else batches

    def _read(self, streams: Ints, places: Ints) -> Windows:
        """The windows at these places."""
        if len(self.streams) == 1:
            return self.streams[0].read(places)
        found = np.empty(len(places), dtype=object)
        for number in np.unique(streams).tolist():
            rows = np.flatnonzero(streams == number)
            for row, window in zip(rows.tolist(), self.streams[number].read(places[rows]), strict=True):
                found[row] = window
        return found.tolist()

    def _find(self, first: int) -> tuple[Ints, Ints, Ints]:
        """(sample numbers, streams, places) of this rank in a step; found for some steps at a time."""
        first = self.plan.after(first, 0)  # itself, if it is not passed over
        if first not in self._found:
            steps = max(1, FOUND_AT_ONCE // self.share)
            numbers = self.plan.numbers(first, steps * self.global_batch).reshape(steps, -1)
            mine = np.ascontiguousarray(numbers[:, self.offset : self.offset + self.share])
            streams, places = (each.reshape(mine.shape) for each in self.plan.find(mine.ravel()))
            found = zip(mine, streams, places, strict=True)
            self._found = dict(zip(numbers[:, 0].tolist(), found, strict=True))
        return self._found[first]
