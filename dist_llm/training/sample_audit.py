"""Check that all ranks together train on exactly the planned samples.

Every few steps the ranks all-gather a digest of their samples and compare it with the digest of the sample plan.
"""

from collections.abc import Sequence

import numpy as np

from dist_llm.data.loader import Loader
from dist_llm.data.order import Ints, splitmix64
from dist_llm.engines.base import Engine
from dist_llm.errors import DataError
from dist_llm.objectives.batch import Batch
from dist_llm.training.callback import Callback, TrainingState


class SampleAudit(Callback):
    """Sums 64-bit digests of the sample numbers in the batches of this rank, and compares the sum with the sample plan.

    `interval`: steps between checks (data.audit_every); None disables the audit.
    """

    def __init__(self, engine: Engine, loader: Loader, interval: int | None) -> None:
        self.engine, self.loader, self.interval = engine, loader, interval
        self.first_samples: list[int] = []  # first sample of each step since the last check
        self.digest_sum = 0

    def before_step(self, state: TrainingState) -> None:
        self.add(state.progress.samples, state.batches)

    def before_save(self, state: TrainingState) -> None:
        self.check()

    def add(self, first_sample: int, batches: Sequence[Batch]) -> None:
        """Add the batches of the step that starts at `first_sample`, and check if the interval has passed.

        Raises DataError on all ranks if a check fails.
        """
        if not self.interval:
            return
        self.first_samples.append(first_sample)
        for batch in batches:
            assert batch.sample_ids_B is not None
            self.digest_sum += digest_samples(batch.sample_ids_B.numpy())
        if len(self.first_samples) == self.interval:
            self.check()

    def check(self) -> None:
        """Compare the samples of all ranks since the last check. Raises DataError on all ranks if one differs."""
        if not self.first_samples:
            return
        dp_rank, dp_size = self.engine.dp_rank_and_size
        loader = self.loader
        planned_steps = [
            loader.plan.list_sample_numbers(first, loader.global_batch).reshape(dp_size, -1)
            for first in self.first_samples
        ]
        expected_digests = [
            _to_int64(sum(digest_samples(step[rank]) for step in planned_steps)) for rank in range(dp_size)
        ]
        dp_ranks = self.engine.all_gather_ints(dp_rank)
        digests = self.engine.all_gather_ints(_to_int64(self.digest_sum))
        wrong_ranks = [
            rank
            for rank, (dp_rank, digest) in enumerate(zip(dp_ranks, digests, strict=True))
            if digest != expected_digests[dp_rank]
        ]
        if wrong_ranks:
            first_sample, last_sample = self.first_samples[0], int(planned_steps[-1][-1, -1])
            raise DataError(
                f"samples {first_sample} to {last_sample}: ranks {', '.join(map(str, wrong_ranks))} "
                "did not read their planned samples, so some samples were read twice or not at all. Check that all "
                "ranks run the same version with the same config"
            )
        self.first_samples, self.digest_sum = [], 0


def digest_samples(samples: Ints) -> int:
    """Return a digest of a set of samples that does not depend on their order."""
    return int(splitmix64(samples.astype(np.uint64)).sum(dtype=np.uint64))


def _to_int64(value: int) -> int:
    """Wrap to a signed 64-bit integer, the type that `all_gather_ints` supports."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
