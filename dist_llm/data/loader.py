"""Build the microbatches of one data-parallel rank in a background thread, some steps ahead of training.

The samples of a run are numbered in the order of training. A step consumes the next `global_batch` sample numbers.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from dist_llm.config.data_sections import DataConfig
from dist_llm.config.schema import Config
from dist_llm.data.order import Ints
from dist_llm.data.plan import SamplePlan
from dist_llm.data.streams import has_prompt_weights
from dist_llm.objectives.batch import Batch
from dist_llm.objectives.build_objective import Objective, Windows, build_objective
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary

LOOKUP_SAMPLES = 4096  # samples that one call locates, because a call costs much more than a sample


class _LocalSamples(NamedTuple):
    """The samples of this rank in a step. The arrays have one element per sample."""

    numbers: Ints
    stream_ids: Ints
    offsets: Ints  # in the window stream


def build_loader(
    config: Config, plan: SamplePlan, vocabulary: ObjectiveVocabulary, dp_rank: int, dp_size: int, *, pin: bool
) -> "Loader":
    """Build the loader of the training samples of a resolved config. With `pin`, batches are in page-locked memory."""
    weights_prompts = has_prompt_weights(config.data, [source.corpus for source in plan.sources])
    return Loader(plan, build_objective(config, vocabulary, weights_prompts), config.data, dp_rank, dp_size, pin=pin)


class Loader:
    """Loads the microbatches of data-parallel rank `dp_rank` of `dp_size`.

    Each rank takes an equal slice of the `global_batch` samples of a step. So the global order of samples does not
    depend on `dp_size`. Methods identify a step by the number of its first sample.
    """

    def __init__(
        self, plan: SamplePlan, objective: Objective, data: DataConfig, dp_rank: int, dp_size: int, *, pin: bool
    ) -> None:
        self.plan, self.objective, self.pin = plan, objective, pin
        self.streams = plan.streams
        self.global_batch, self.micro_batch = data.global_batch, data.micro_batch
        self.local_batch = data.global_batch // dp_size
        self.rank_offset = dp_rank * self.local_batch  # index of the first sample of this rank in a global batch
        self.prefetch = data.prefetch
        self._pool = ThreadPoolExecutor(1, "loader") if data.prefetch else None
        self._futures: dict[int, Future[list[Batch]]] = {}  # by the first sample of the step
        self._locations: dict[int, _LocalSamples] = {}  # by the first sample of the step

    def get_local_samples(self, first_sample: int) -> Ints:
        """Return the sample numbers of this rank in the step that starts at `first_sample`."""
        numbers = self.plan.list_sample_numbers(first_sample, self.global_batch)
        return numbers[self.rank_offset : self.rank_offset + self.local_batch]

    def advance(self, first_sample: int) -> int:
        """Return the first sample of the step after the step that starts at `first_sample`."""
        return self.plan.advance(first_sample, self.global_batch)

    def advance_steps(self, first_sample: int, num_steps: int) -> int:
        """Return the first sample of the step that is `num_steps` after the step that starts at `first_sample`."""
        for _ in range(num_steps):
            first_sample = self.advance(first_sample)
        return first_sample

    def load_batches(self, first_sample: int) -> list[Batch]:
        """Return the microbatches of the step that starts at `first_sample`. Start to build those of the next steps."""
        if self._pool is None:
            return self._build_batches(first_sample)
        step_start = first_sample
        for _ in range(self.prefetch + 1):
            if step_start not in self._futures:
                self._futures[step_start] = self._pool.submit(self._build_batches, step_start)
            step_start = self.advance(step_start)
        return self._futures.pop(first_sample).result()

    def load_batches_of_rank(self, dp_rank: int, first_sample: int) -> list[Batch]:
        """Return the microbatches of data-parallel rank `dp_rank` in the step that starts at `first_sample`."""
        loader = copy(self)
        loader.rank_offset, loader._locations = dp_rank * self.local_batch, {}
        # Build in the thread of this loader, because a corpus is not thread-safe.
        if self._pool is None:
            return loader._build_batches(first_sample)
        return self._pool.submit(loader._build_batches, first_sample).result()

    def close(self) -> None:
        """Stop the background thread, and drop batches that are not built yet."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _build_batches(self, first_sample: int) -> list[Batch]:
        sample_numbers, stream_ids, offsets = self._locate_samples(first_sample)
        windows = self._read_windows(stream_ids, offsets)
        num_components = len(self.objective.components)
        component_ids = (stream_ids % num_components).tolist() if num_components > 1 else ()
        batches = []
        for start in range(0, len(sample_numbers), self.micro_batch):
            rows = slice(start, start + self.micro_batch)
            batch = self.objective(windows[rows], sample_numbers[rows], component_ids[rows])
            if len(self.plan.sources) > 1:
                batch = replace(batch, source_ids_B=torch.from_numpy(stream_ids[rows] // num_components))
            batches.append(batch)
        return [batch.pin_memory() for batch in batches] if self.pin else batches

    def _read_windows(self, stream_ids: Ints, offsets: Ints) -> Windows:
        """Read window i at offsets[i] of the window stream with index stream_ids[i]."""
        if len(self.streams) == 1:
            return self.streams[0].read(offsets)
        windows = np.empty(len(offsets), dtype=object)
        for stream_id in np.unique(stream_ids).tolist():
            rows = np.flatnonzero(stream_ids == stream_id)
            for row, window in zip(rows.tolist(), self.streams[stream_id].read(offsets[rows]), strict=True):
                windows[row] = window
        return windows.tolist()

    def _locate_samples(self, first_sample: int) -> _LocalSamples:
        """Return the samples of this rank in the step that starts at `first_sample`.

        Samples are located for several steps at a time and cached.
        """
        first_sample = self.plan.advance(first_sample, 0)  # move out of a skipped range
        if first_sample not in self._locations:
            num_steps = max(1, LOOKUP_SAMPLES // self.local_batch)
            numbers = self.plan.list_sample_numbers(first_sample, num_steps * self.global_batch).reshape(num_steps, -1)
            local_numbers = np.ascontiguousarray(numbers[:, self.rank_offset : self.rank_offset + self.local_batch])
            locations = self.plan.locate_samples(local_numbers.ravel())
            stream_ids, offsets = (array.reshape(local_numbers.shape) for array in locations)
            samples_by_step = map(_LocalSamples, local_numbers, stream_ids, offsets)
            self._locations = dict(zip(numbers[:, 0].tolist(), samples_by_step, strict=True))
        return self._locations[first_sample]
