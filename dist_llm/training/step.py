"""Take one optimizer step on a global batch.

Losses are sums over targets. They are divided once, by the number of valid tokens (targets that count) of the global
batch, or by the sum of their weights. This denominator is known before the forward pass. So the gradient does not
depend on how the tokens are split into ranks and microbatches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dist_llm.config.schema import LossConfig
from dist_llm.engines.base import Engine
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.router_stats import RouterStats
from dist_llm.objectives.batch import Batch


@dataclass(frozen=True)
class StepReport:
    """The results of a step over all ranks. Tensors stay on the device until they are logged."""

    loss: Tensor  # (weighted) mean over valid tokens, in nats
    grad_norm: Tensor  # before clipping
    loss_denominator: Tensor  # number of valid tokens of the global batch, or the sum of their weights
    by_source: Tensor | None = None  # [3, num_sources], see `_sum_by_source`
    # Of each layer with a mixture of experts: counts of the global batch, and means over its sequences.
    router_stats: Mapping[int, RouterStats] = field(default_factory=dict)
    loss_terms: Tensor | None = None  # [2]: mean cross-entropy and mean z-loss over valid tokens


def train_step(
    engine: Engine,
    batches: Sequence[Batch],
    lr: float,
    step: int = 0,
    num_sources: int = 1,
    should_apply: Callable[[Tensor, Tensor], bool] | None = None,
    with_loss_terms: bool = False,
) -> StepReport:
    """Take one optimizer step. Each of `batches` is one microbatch of this data-parallel rank.

    `step` seeds dropout. `num_sources`: if above 1, report the loss of each data source. `should_apply(loss,
    grad_norm)`: if it returns False, weights and moments stay unchanged. `with_loss_terms`: also report the terms of a
    loss with label smoothing or z-loss.
    """
    batches = [engine.to_local_batch(batch) for batch in batches]
    denominator = compute_loss_denominator(engine, batches)
    losses = engine.accumulate(batches, replace_zero(denominator), step)
    by_source = None
    if num_sources > 1:
        by_source = engine.all_reduce_over_dp_and_cp(_sum_by_source(batches, losses, num_sources))
    loss_terms = _pop_loss_terms(engine, len(batches), losses)
    if with_loss_terms:
        loss_terms = engine.all_reduce_over_dp_and_cp(loss_terms) / replace_zero(denominator)
    loss = engine.all_reduce_over_dp_and_cp(losses.sum())
    norm = engine.update(lr, None if should_apply is None else partial(should_apply, loss))
    return StepReport(
        loss,
        norm,
        denominator,
        by_source,
        engine.router_stats,
        loss_terms if with_loss_terms else None,
    )


def compute_loss_denominator(engine: Engine, batches: Sequence[Batch]) -> Tensor:
    """Return the sum of the weights of all targets of the global batch, [], which is their number without weights."""
    return engine.all_reduce_over_dp_and_cp(sum(batch.loss_denominator for batch in batches))


def replace_zero(denominator: Tensor) -> Tensor:
    """Return a denominator by which the losses can be divided. It is 1 if no target of the global batch counts."""
    return torch.where(denominator > 0, denominator, 1)


def _pop_loss_terms(engine: Engine, num_microbatches: int, losses: Tensor) -> Tensor:
    """Return the sums of cross-entropy and z-loss of this rank, [2], which the loss collected in this step.

    The sums are zeros on a rank without a head, and for a loss without label smoothing and z-loss.
    """
    sums = losses.new_zeros(2)
    for model_part in engine.model_parts:
        collected = None if model_part.head is None else model_part.head.terms
        if collected is not None and (part_sums := collected.pop_latest(num_microbatches)) is not None:
            sums = sums + part_sums
    return sums


def _sum_by_source(batches: Sequence[Batch], losses: Tensor, num_sources: int) -> Tensor:
    """Sum by data source, over this rank: the losses, the loss weights and the valid tokens, [3, num_sources].

    The losses are divided by the denominator of the global batch already.
    """
    source_ids = torch.cat([batch.source_ids_B for batch in batches if batch.source_ids_B is not None])
    counts_B = [(batch.targets_BS != IGNORE_INDEX).sum(-1) for batch in batches]
    weights_B = [
        counts if batch.loss_weights_BS is None else batch.loss_weights_BS.sum(-1)
        for batch, counts in zip(batches, counts_B, strict=True)
    ]
    values = torch.stack((losses, torch.cat(weights_B).to(losses), torch.cat(counts_B).to(losses)))  # [3, sequences]
    return values.new_zeros(3, num_sources).index_add_(1, source_ids, values)


def name_loss_terms(report: StepReport, config: LossConfig) -> dict[str, Tensor]:
    """Return the terms of a regularized loss by metric name; {} for a loss without regularization."""
    if report.loss_terms is None:
        return {}
    cross_entropy, z_loss = report.loss_terms
    terms = {"cross_entropy": cross_entropy}
    if config.label_smoothing:
        terms["label_smoothing"] = report.loss - cross_entropy - z_loss
    if config.z_loss:
        terms["z_loss"] = z_loss
    return terms
