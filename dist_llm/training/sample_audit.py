"""Check that the ranks together trained on exactly the planned samples: one small all-gather every few steps."""

from collections.abc import Sequence

import numpy as np

from dist_llm.data.loader import Loader
from dist_llm.data.order import Ints, splitmix64
from dist_llm.engines.base import Engine
from dist_llm.errors import DataError
from dist_llm.objectives.batch import Batch


class SampleAudit:
    """Sums a 64-bit digest of the sample numbers in this rank's batches, and compares it with the sample plan.

    `interval`: steps between checks (data.audit_every); 0: never.
    """

    def __init__(self, engine: Engine, loader: Loader, interval: int) -> None:
        self.engine, self.loader, self.interval = engine, loader, interval
        self.first_samples: list[int] = []  # of each step since the last check
        self.digest_sum = 0

    def add(self, first_sample: int, batches: Sequence[Batch]) -> None:
        """Add the batches of the step that starts at `first_sample`. Raises DataError on all ranks if a check fails."""
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
        planned = [
            loader.plan.list_sample_numbers(first, loader.global_batch).reshape(dp_size, -1)
            for first in self.first_samples
        ]
        expected = [_to_int64(sum(digest_samples(step[rank]) for step in planned)) for rank in range(dp_size)]
        dp_ranks = self.engine.all_gather_ints(dp_rank)
        digests = self.engine.all_gather_ints(_to_int64(self.digest_sum))
        wrong = [
            rank for rank, (dp, digest) in enumerate(zip(dp_ranks, digests, strict=True)) if digest != expected[dp]
        ]
        if wrong:
            raise DataError(
                f"samples {self.first_samples[0]} to {int(planned[-1][-1, -1])}: ranks {', '.join(map(str, wrong))} "
                "did not read their planned samples, so some samples were read twice or not at all. Check that all "
                "ranks run the same version with the same config"
            )
        self.first_samples, self.digest_sum = [], 0


def digest_samples(samples: Ints) -> int:
    """Return a digest of the set of samples, independent of their order. Different sets are unlikely to share it."""
    return int(splitmix64(samples.astype(np.uint64)).sum(dtype=np.uint64))


def _to_int64(value: int) -> int:
    """Wrap to a signed 64-bit integer, the type that ranks all-gather."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
