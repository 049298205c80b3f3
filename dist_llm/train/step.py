"""One optimizer step: where every loss is divided, once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dist_llm.engines.base import Engine
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.objectives.batch import Batch


@dataclass(frozen=True)
class StepReport:
    """What the step saw, over the whole world. Tensors stay on the device until someone logs them."""

    loss: Tensor  # mean over scored tokens, nats
    grad_norm: Tensor  # before clipping
    scored: Tensor
    by_source: Tensor | None = None  # [2, sources]: their shares of the loss, and their scored tokens


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    lr: float,
    step: int = 0,
    sources: int = 1,
    accept: Callable[[Tensor, Tensor], bool] | None = None,
) -> StepReport:
    """Take one optimizer step; each batch is one microbatch of this data rank. `step` seeds dropout.

    `accept`, asked with the loss and the gradient's norm, may say no: then weights and moments stay as they are.

    Losses are sums, divided once by the number of tokens the whole world scores, so the
    gradient does not depend on how those tokens were cut into ranks and microbatches.
    """
    batches = [engine.cut(batch) for batch in batches]
    scored = engine.total(sum(batch.scored for batch in batches))
    losses = engine.accumulate(batches, scored, step)
    by_source = None
    if sources > 1:
        by_source = engine.total(_by_source(batches, losses, sources))
    loss = engine.total(losses.sum())
    norm = engine.update(lr, None if accept is None else partial(accept, loss))
    return StepReport(loss, norm, scored, by_source)


def _by_source(batches: Sequence[Batch], losses: Tensor, sources: int) -> Tensor:
    """This rank's part of [2, sources]: of the loss, and of the scored tokens."""
    owners = torch.cat([batch.sources_B for batch in batches if batch.sources_B is not None])
    counts = torch.cat([(batch.targets_BS != IGNORE).sum(-1) for batch in batches])
    rows = torch.stack((losses, counts.to(losses)))
    return rows.new_zeros(2, sources).index_add_(1, owners, rows)
