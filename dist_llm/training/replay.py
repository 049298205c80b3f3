"""Compute the same step on two ranks: each data rank repeats its neighbour's batch, and both results must agree.

No update is applied. Gradients are sums over all ranks, so that they show an error but not its rank. The loss shows the
rank, if the error is in the forward pass.
"""

import struct

from torch import Tensor

from dist_llm.data.loader import Loader
from dist_llm.engines.base import Engine
from dist_llm.objectives.batch import Batch
from dist_llm.sharded import to_local

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}  # relative; the order of summation differs


def replay(engine: Engine, loader: Loader, first_sample: int, step: int, precision: str) -> list[str]:
    """Compute the step that starts at `first_sample` twice. Returns the differences, the same lines on all ranks.

    Each rank computes the gradients of its own samples, then those of the next data rank. This requires engine: native
    and a model without dropout. It costs two steps and a copy of the gradients.
    """
    dp_rank, dp_size = engine.dp_rank_and_size
    own, own_loss = _compute_gradients(engine, loader.load_batches_of_rank(dp_rank, first_sample), step)
    next_rank = (dp_rank + 1) % dp_size
    repeated, repeated_loss = _compute_gradients(engine, loader.load_batches_of_rank(next_rank, first_sample), step)
    different = [name for name, grad in own.items() if not _is_close(repeated[name], grad, TOLERANCE[precision])]
    counts = engine.all_gather_ints(len(different))
    dp_ranks = engine.all_gather_ints(dp_rank)
    losses = _sum_by_data_rank(engine, dp_ranks, dp_size, own_loss)
    repeated_losses = _sum_by_data_rank(engine, dp_ranks, dp_size, repeated_loss)
    if not any(counts):
        return []
    worst = max(counts)
    lines = [f"a step computed twice has other gradients, of {worst} parameters on rank {counts.index(worst)}"]
    for owner, loss in enumerate(losses):
        repeater = (owner - 1) % dp_size
        if repeated_losses[repeater] != loss:
            by, also_by = _format_ranks(dp_ranks, owner), _format_ranks(dp_ranks, repeater)
            lines.append(
                f"the loss of a batch is {loss:.9g} by rank {by}, {repeated_losses[repeater]:.9g} by {also_by}"
            )
    return lines


def _compute_gradients(engine: Engine, batches: list[Batch], step: int) -> tuple[dict[str, Tensor], float]:
    """Return (this rank's shard of the gradients, its share of the loss), and clear the engine's gradients."""
    batches = [engine.to_local_batch(batch) for batch in batches]
    scored = engine.all_reduce_over_data(sum(batch.num_valid_tokens for batch in batches))
    losses = engine.accumulate(batches, scored, step)
    gradients = {}
    for name, parameter in engine.named_parameters():
        if parameter.grad is not None:
            gradients[name] = to_local(parameter.grad).clone()
            parameter.grad = None
    return gradients, float(losses.double().sum())


def _sum_by_data_rank(engine: Engine, dp_ranks: list[int], dp_size: int, value: float) -> list[float]:
    """Return for each data rank the sum of the values of all its ranks."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))  # ranks all-gather integers
    sums = [0.0] * dp_size
    for dp_rank, gathered in zip(dp_ranks, engine.all_gather_ints(bits), strict=True):
        sums[dp_rank] += struct.unpack("<d", struct.pack("<q", gathered))[0]
    return sums


def _format_ranks(dp_ranks: list[int], dp_rank: int) -> str:
    return " and ".join(str(rank) for rank, each in enumerate(dp_ranks) if each == dp_rank)


def _is_close(value: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether two gradients agree, relative to the largest element; nearly zero gradients are rounding noise.

    A non-finite gradient must be non-finite both times. The guard or the loss scale handles it.
    """
    if not expected.numel():
        return True
    if not (expected.isfinite().all() and value.isfinite().all()):
        return bool(expected.isfinite().all()) == bool(value.isfinite().all())
    error, largest = float((value - expected).abs().max()), float(expected.abs().max())
    return error <= 10 * tolerance * largest + 1e-9
