"""Did the ranks, together, train on exactly the samples they should? Asked every few steps, for one small message."""

from collections.abc import Sequence

import numpy as np

from dist_llm.data.loader import Loader
from dist_llm.data.order import Ints, mix
from dist_llm.engines.base import Engine
from dist_llm.errors import DataError
from dist_llm.objectives.batch import Batch


class Audit:
    """Adds up a 64-bit digest of the sample numbers that this rank's batches carry, and compares it with the plan."""

    def __init__(self, engine: Engine, loader: Loader, every: int) -> None:
        self.engine, self.loader, self.every = engine, loader, every
        self.firsts: list[int] = []
        self.found = 0

    def add(self, first: int, batches: Sequence[Batch]) -> None:
        """The batches of the step that starts at sample `first`. Raises DataError on all ranks if one strayed."""
        if not self.every:
            return
        self.firsts.append(first)
        for batch in batches:
            assert batch.sample_ids_B is not None
            self.found += digest(batch.sample_ids_B.numpy())
        if len(self.firsts) == self.every:
            self.check()

    def check(self) -> None:
        """Compare with all ranks what was read since the last time."""
        if not self.firsts:
            return
        _, ranks = self.engine.dp_rank_and_size
        loader = self.loader
        planned = [loader.plan.numbers(first, loader.global_batch).reshape(ranks, -1) for first in self.firsts]
        wanted = [_wrapped(sum(digest(step[rank]) for step in planned)) for rank in range(ranks)]
        places = self.engine.all_gather_ints(self.engine.dp_rank_and_size[0])
        found = self.engine.all_gather_ints(_wrapped(self.found))
        strayed = [rank for rank, (place, each) in enumerate(zip(places, found, strict=True)) if each != wanted[place]]
        if strayed:
            raise DataError(
                f"samples {self.firsts[0]} to {int(planned[-1][-1, -1])}: ranks {', '.join(map(str, strayed))} did not "
                "read the samples that are theirs, so that some were read twice or left out. Do all ranks run the "
                "same version, with the same config?"
            )
        self.firsts, self.found = [], 0


def digest(samples: Ints) -> int:
    """A number that two different sets of samples hardly share, whatever their order."""
    return int(mix(samples.astype(np.uint64)).sum(dtype=np.uint64))


def _wrapped(value: int) -> int:
    """As a signed 64-bit integer, which is what ranks exchange."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
