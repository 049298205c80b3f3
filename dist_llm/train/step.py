"""One optimizer step: where every loss is divided, once."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dist_llm.engines.base import Engine
from dist_llm.objectives.batch import Batch


@dataclass(frozen=True)
class StepReport:
    """What the step saw, over the whole world. Tensors stay on the device until someone logs them."""

    loss: Tensor  # mean over scored tokens, nats
    grad_norm: Tensor  # before clipping
    scored: Tensor


def train_step(engine: Engine, batches: Sequence[Batch], lr: float, seed: int = 0) -> StepReport:
    """Take one optimizer step; each batch is one microbatch of this rank.

    Losses are sums, divided once by the number of tokens the whole world scores, so the
    gradient does not depend on how those tokens were cut into ranks and microbatches.
    `seed` is of this step; each microbatch of each data rank has a dropout seed of its own.
    """
    rank, ranks = engine.data_rank
    scored = engine.total(sum(batch.scored for batch in batches))
    losses = [
        engine.accumulate(batch, scored, last=batch is batches[-1], seed=dropout_seed(seed, place * ranks + rank))
        for place, batch in enumerate(batches)
    ]
    loss = engine.total(sum(losses[1:], losses[0]))
    return StepReport(loss, engine.update(lr), scored)


def dropout_seed(*numbers: int) -> int:
    """A 63-bit seed that depends on all of `numbers` and their order."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
