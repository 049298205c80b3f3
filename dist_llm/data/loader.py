"""Build the microbatches of one data-parallel rank from sample numbers, in advance and in a thread."""

from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import replace

import numpy as np
import torch

from dist_llm.config.data_sections import DataConfig
from dist_llm.config.schema import Config
from dist_llm.data.order import Ints
from dist_llm.data.plan import SamplePlan
from dist_llm.data.streams import masks_prompts
from dist_llm.objectives.batch import Batch
from dist_llm.objectives.build_objective import Objective, Windows, build_objective
from dist_llm.objectives.objective_vocabulary import Vocabulary

LOOKUP_SAMPLES = 4096  # samples located per call; each call has a high fixed cost


def build_loader(
    config: Config, plan: SamplePlan, vocabulary: Vocabulary, dp_rank: int, dp_size: int, pin: bool
) -> "Loader":
    """Build the loader of a resolved config's training samples."""
    has_prompts = masks_prompts(config.data, [source.corpus for source in plan.sources])
    return Loader(plan, build_objective(config, vocabulary, has_prompts), config.data, dp_rank, dp_size, pin)


class Loader:
    """Loads the batches of data-parallel rank `dp_rank` of `dp_size`. The global order is the same for any `dp_size`.

    A step that starts at sample n consumes the next `global_batch` numbers; each rank takes its slice.
    """

    def __init__(
        self, plan: SamplePlan, objective: Objective, data: DataConfig, dp_rank: int, dp_size: int, pin: bool
    ) -> None:
        self.plan, self.objective, self.pin = plan, objective, pin
        self.streams = plan.streams
        self.global_batch, self.micro_batch = data.global_batch, data.micro_batch
        self.local_batch = data.global_batch // dp_size
        self.offset = dp_rank * self.local_batch
        self.prefetch = data.prefetch
        self._pool = ThreadPoolExecutor(1, "loader") if data.prefetch else None
        self._futures: dict[int, Future[list[Batch]]] = {}
        self._locations: dict[int, tuple[Ints, Ints, Ints]] = {}  # by the first sample of the step

    def local_samples(self, first: int) -> Ints:
        """Return the sample numbers of this rank in the step that starts at sample `first`."""
        return self.plan.sample_numbers(first, self.global_batch)[self.offset : self.offset + self.local_batch]

    def advance(self, first: int) -> int:
        """Return the first sample of the step after the one that starts at sample `first`."""
        return self.plan.advance(first, self.global_batch)

    def advance_steps(self, first: int, steps: int) -> int:
        """Return the first sample of the step `steps` after the one that starts at sample `first`."""
        for _ in range(steps):
            first = self.advance(first)
        return first

    def load_batches(self, first: int) -> list[Batch]:
        """Return the microbatches of the step that starts at sample `first`, and start to build the next steps."""
        if self._pool is None:
            return self._build_batches(first)
        ahead = first
        for _ in range(self.prefetch + 1):
            if ahead not in self._futures:
                self._futures[ahead] = self._pool.submit(self._build_batches, ahead)
            ahead = self.advance(ahead)
        return self._futures.pop(first).result()

    def load_batches_of_rank(self, dp_rank: int, first: int) -> list[Batch]:
        """Return the microbatches of data-parallel rank `dp_rank` in the step that starts at sample `first`."""
        loader = copy(self)
        loader.offset, loader._locations = dp_rank * self.local_batch, {}
        # Runs in the loader's thread, because a corpus is not thread-safe.
        if self._pool is None:
            return loader._build_batches(first)
        return self._pool.submit(loader._build_batches, first).result()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _build_batches(self, first: int) -> list[Batch]:
        samples, streams, offsets = self._locate_samples(first)
        windows = self._read_windows(streams, offsets)
        num_components = len(self.objective.components)
        component_ids = (streams % num_components).tolist() if num_components > 1 else ()
        batches = []
        for start in range(0, len(samples), self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            batch = self.objective(windows[rows], samples[rows], component_ids[rows])
            if len(self.plan.sources) > 1:
                batch = replace(batch, source_ids_B=torch.from_numpy(streams[rows] // num_components))
            batches.append(batch)
        return [batch.pin_memory() for batch in batches] if self.pin else batches

    def _read_windows(self, streams: Ints, offsets: Ints) -> Windows:
        """Read the windows at these offsets of these streams."""
        if len(self.streams) == 1:
            return self.streams[0].read(offsets)
        windows = np.empty(len(offsets), dtype=object)
        for stream in np.unique(streams).tolist():
            rows = np.flatnonzero(streams == stream)
            for row, window in zip(rows.tolist(), self.streams[stream].read(offsets[rows]), strict=True):
                windows[row] = window
        return windows.tolist()

    def _locate_samples(self, first: int) -> tuple[Ints, Ints, Ints]:
        """Return (sample numbers, streams, offsets) of this rank in a step. They are computed for several steps at a
        time."""
        first = self.plan.advance(first, 0)  # `first` itself, unless it is skipped
        if first not in self._locations:
            steps = max(1, LOOKUP_SAMPLES // self.local_batch)
            numbers = self.plan.sample_numbers(first, steps * self.global_batch).reshape(steps, -1)
            local_numbers = np.ascontiguousarray(numbers[:, self.offset : self.offset + self.local_batch])
            located = self.plan.locate_samples(local_numbers.ravel())
            streams, offsets = (array.reshape(local_numbers.shape) for array in located)
            locations = zip(local_numbers, streams, offsets, strict=True)
            self._locations = dict(zip(numbers[:, 0].tolist(), locations, strict=True))
        return self._locations[first]
