"""Take one optimizer step; this is the only place where losses are divided."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dist_llm.config.schema import LossConfig
from dist_llm.engines.base import Engine
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.objectives.batch import Batch


@dataclass(frozen=True)
class StepReport:
    """The results of a step over the whole world. Tensors stay on the device until someone logs them."""

    loss: Tensor  # mean over valid tokens, in nats
    grad_norm: Tensor  # before clipping
    scored: Tensor
    by_source: Tensor | None = None  # [2, sources]: each source's share of the loss, and its number of valid tokens
    terms: Tensor | None = None  # [2]: mean cross-entropy and mean z-loss over valid tokens


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    lr: float,
    step: int = 0,
    sources: int = 1,
    should_apply: Callable[[Tensor, Tensor], bool] | None = None,
    with_terms: bool = False,
) -> StepReport:
    """Take one optimizer step; each batch is one microbatch of this data rank. `step` seeds dropout.

    `with_terms`: also report the terms of a loss with label smoothing or z-loss.
    `accept(loss, grad_norm)`: if it returns False, weights and moments stay unchanged.

    Losses are sums, divided once by the number of valid tokens of the whole world, so the gradient does not depend on
    how the tokens are split into ranks and microbatches.
    """
    batches = [engine.to_local_batch(batch) for batch in batches]
    scored = engine.all_reduce_over_data(sum(batch.num_valid_tokens for batch in batches))
    losses = engine.accumulate(batches, scored, step)
    by_source = None
    if sources > 1:
        by_source = engine.all_reduce_over_data(_by_source(batches, losses, sources))
    terms = _terms(engine, len(batches), losses)
    if with_terms:
        terms = engine.all_reduce_over_data(terms) / scored.clamp(min=1)
    loss = engine.all_reduce_over_data(losses.sum())
    norm = engine.update(lr, None if should_apply is None else partial(should_apply, loss))
    return StepReport(loss, norm, scored, by_source, terms if with_terms else None)


def _terms(engine: Engine, microbatches: int, losses: Tensor) -> Tensor:
    """Return this rank's sums of cross-entropy and z-loss, [2]; zeros without a head or with a plain loss."""
    sums = losses.new_zeros(2)
    for part in engine.model_parts:
        collected = None if part.head is None else part.head.terms
        if collected is not None and (sums_of_part := collected.pop_latest(microbatches)) is not None:
            sums = sums + sums_of_part
    return sums


def _by_source(batches: Sequence[Batch], losses: Tensor, sources: int) -> Tensor:
    """Return this rank's contribution to [2, sources]: loss and number of valid tokens by source."""
    owners = torch.cat([batch.source_ids_B for batch in batches if batch.source_ids_B is not None])
    counts = torch.cat([(batch.targets_BS != IGNORE_INDEX).sum(-1) for batch in batches])
    rows = torch.stack((losses, counts.to(losses)))
    return rows.new_zeros(2, sources).index_add_(1, owners, rows)


def terms_of(report: StepReport, config: LossConfig) -> dict[str, Tensor]:
    """Return the terms of a regularized loss by metric name; {} for a plain loss."""
    if report.terms is None:
        return {}
    cross_entropy, z_loss = report.terms
    terms = {"cross_entropy": cross_entropy}
    if config.label_smoothing:
        terms["label_smoothing"] = report.loss - cross_entropy - z_loss
    if config.z_loss:
        terms["z_loss"] = z_loss
    return terms
