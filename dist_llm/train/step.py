"""One optimizer step: where every loss is divided, once."""

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


def train_step(engine: Engine, batches: Sequence[Batch], lr: float, step: int = 0) -> StepReport:
    """Take one optimizer step; each batch is one microbatch of this data rank. `step` seeds dropout.

    Losses are sums, divided once by the number of tokens the whole world scores, so the
    gradient does not depend on how those tokens were cut into ranks and microbatches.
    """
    batches = [engine.cut(batch) for batch in batches]
    scored = engine.total(sum(batch.scored for batch in batches))
    loss = engine.accumulate(batches, scored, step)
    return StepReport(engine.total(loss), engine.update(lr), scored)
