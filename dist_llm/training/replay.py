"""Detect faulty hardware: compute a step twice, where each data-parallel rank repeats the batches of the next rank.

No update is applied. Gradients are sums over all ranks, so they show an error but not the rank that made the error. The
loss shows the rank if the error is in the forward pass.
"""

import struct

from torch import Tensor

from dist_llm.data.loader import Loader
from dist_llm.engines.base import Engine
from dist_llm.objectives.batch import Batch
from dist_llm.sharded import to_local
from dist_llm.training.callback import Callback, TrainingState
from dist_llm.training.guard import Guard
from dist_llm.training.step import compute_loss_denominator, replace_zero

# Relative tolerance of a gradient by precision. The two computations sum in different orders.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}


class StepReplay(Callback):
    """Computes each step whose number is a multiple of `interval` (guard.replay_every) twice before it is taken.

    If the results differ, the guard raises DivergedError or RewindRequest on all ranks. None or 0 disables the replay.
    """

    def __init__(self, guard: Guard, interval: int | None) -> None:
        self.guard, self.interval = guard, interval

    def before_step(self, state: TrainingState) -> None:
        progress, step = state.progress, state.progress.step + 1
        if self.interval and step % self.interval == 0:
            differences = replay_step(
                state.engine, state.loader, progress.samples, progress.step, state.config.precision
            )
            self.guard.handle_divergence(step, differences)


def replay_step(engine: Engine, loader: Loader, first_sample: int, step: int, precision: str) -> list[str]:
    """Compute the step that starts at `first_sample` twice. Return one line per difference, the same on all ranks.

    Each rank computes the gradients of its own samples, and then the gradients of the samples of the next data-parallel
    rank. This requires engine: native and a model without dropout. The cost is two steps and a copy of the gradients.
    """
    dp_rank, dp_size = engine.dp_rank_and_size
    grads, loss = _compute_gradients(engine, loader.load_batches_of_rank(dp_rank, first_sample), step)
    next_rank = (dp_rank + 1) % dp_size
    replayed_grads, replayed_loss = _compute_gradients(
        engine, loader.load_batches_of_rank(next_rank, first_sample), step
    )
    tolerance = TOLERANCE[precision]
    mismatches = [name for name, grad in grads.items() if not _is_close(replayed_grads[name], grad, tolerance)]
    num_mismatches_by_rank = engine.all_gather_ints(len(mismatches))
    dp_ranks = engine.all_gather_ints(dp_rank)
    losses = _sum_by_data_rank(engine, dp_ranks, dp_size, loss)
    replayed_losses = _sum_by_data_rank(engine, dp_ranks, dp_size, replayed_loss)
    if not any(num_mismatches_by_rank):
        return []
    max_mismatches = max(num_mismatches_by_rank)
    worst_rank = num_mismatches_by_rank.index(max_mismatches)
    lines = [f"a step computed twice has different gradients, of {max_mismatches} parameters on rank {worst_rank}"]
    for owner, owner_loss in enumerate(losses):
        repeater = (owner - 1) % dp_size
        if replayed_losses[repeater] != owner_loss:
            lines.append(
                f"the loss of a batch is {owner_loss:.9g} by rank {_format_ranks(dp_ranks, owner)}, "
                f"{replayed_losses[repeater]:.9g} by {_format_ranks(dp_ranks, repeater)}"
            )
    return lines


def _compute_gradients(engine: Engine, batches: list[Batch], step: int) -> tuple[dict[str, Tensor], float]:
    """Return (gradient shards of this rank by parameter name, the share of the loss of this rank).

    The gradients of the engine are cleared.
    """
    batches = [engine.to_local_batch(batch) for batch in batches]
    losses = engine.accumulate(batches, replace_zero(compute_loss_denominator(engine, batches)), step)
    gradients = {}
    for name, parameter in engine.named_parameters():
        if parameter.grad is not None:
            gradients[name] = to_local(parameter.grad).clone()
            parameter.grad = None
    return gradients, float(losses.double().sum())


def _sum_by_data_rank(engine: Engine, dp_ranks: list[int], dp_size: int, value: float) -> list[float]:
    """Return for each data-parallel rank the sum of `value` over the ranks that share its samples."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))  # the engine all-gathers integers only
    sums = [0.0] * dp_size
    for dp_rank, gathered_bits in zip(dp_ranks, engine.all_gather_ints(bits), strict=True):
        sums[dp_rank] += struct.unpack("<d", struct.pack("<q", gathered_bits))[0]
    return sums


def _format_ranks(dp_ranks: list[int], dp_rank: int) -> str:
    return " and ".join(str(rank) for rank, rank_dp_rank in enumerate(dp_ranks) if rank_dp_rank == dp_rank)


def _is_close(value: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return whether two gradients agree, relative to the largest element. Nearly zero gradients always agree.

    A gradient that is not finite must be so in both computations. The guard or the loss scale handles that case.
    """
    if not expected.numel():
        return True
    if not (expected.isfinite().all() and value.isfinite().all()):
        return bool(expected.isfinite().all()) == bool(value.isfinite().all())
    error, largest = float((value - expected).abs().max()), float(expected.abs().max())
    return error <= 10 * tolerance * largest + 1e-9
