"""The same step on other ranks: each computes what its neighbour is to compute, and both must come to the same.

Nothing is stepped. Gradients, which are sums over all ranks, tell that one went wrong; losses, which one, if it was in
the forward pass.
"""

import struct

from torch import Tensor

from dist_llm.data.loader import Loader
from dist_llm.engines.base import Engine
from dist_llm.objectives.batch import Batch
from dist_llm.parallel.mesh import to_local

TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "fp16": 1e-2}  # relative; sums are taken in another order


def replay(engine: Engine, loader: Loader, first: int, step: int, precision: str) -> list[str]:
    """What does not agree in the step that starts at sample `first`, the same lines on all ranks; none: all does.

    Each rank takes the gradient of its own samples, then of those of the next data rank. Needs gradients that ranks
    share with nobody (the native engine's) and a model without dropout. Costs two steps, and a copy of the gradients.
    """
    place, places = engine.dp_rank_and_size
    own, own_losses = _gradients(engine, loader.batches_of(place, first), step)
    other, other_losses = _gradients(engine, loader.batches_of((place + 1) % places, first), step)
    odd = [name for name, gradient in own.items() if not _close(other[name], gradient, TOLERANCE[precision])]
    wrong = engine.all_gather_ints(len(odd))
    at = engine.all_gather_ints(place)
    by_own, by_other = _by_place(engine, at, places, own_losses), _by_place(engine, at, places, other_losses)
    if not any(wrong):
        return []
    lines = [f"a step computed twice has other gradients, of {max(wrong)} parameters on rank {wrong.index(max(wrong))}"]
    for here, loss in enumerate(by_own):
        there = (here - 1) % places
        if by_other[there] != loss:
            by, also = (_ranks(at, place) for place in (here, there))
            lines.append(f"the loss of a batch is {loss:.9g} by rank {by}, {by_other[there]:.9g} by {also}")
    return lines


def _gradients(engine: Engine, batches: list[Batch], step: int) -> tuple[dict[str, Tensor], float]:
    """(this rank's share of the gradients, its share of the loss); the engine's are cleared."""
    batches = [engine.to_local_batch(batch) for batch in batches]
    scored = engine.all_reduce_over_data(sum(batch.num_valid_tokens for batch in batches))
    losses = engine.accumulate(batches, scored, step)
    found = {}
    for name, parameter in engine.named_parameters():
        if parameter.grad is not None:
            found[name] = to_local(parameter.grad).clone()
            parameter.grad = None
    return found, float(losses.double().sum())


def _by_place(engine: Engine, at: list[int], places: int, value: float) -> list[float]:
    """The values of all ranks, added up by their place among the data ranks."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    found = [0.0] * places
    for place, each in zip(at, engine.all_gather_ints(bits), strict=True):
        found[place] += struct.unpack("<d", struct.pack("<q", each))[0]
    return found


def _ranks(at: list[int], place: int) -> str:
    return " and ".join(str(rank) for rank, each in enumerate(at) if each == place)


def _close(found: Tensor, wanted: Tensor, allowed: float) -> bool:
    """To a share of the largest element; what is nearly nothing everywhere is rounding.

    What is not finite, for the guard or the loss scale to deal with, has to be so both times.
    """
    if not wanted.numel():
        return True
    if not (wanted.isfinite().all() and found.isfinite().all()):
        return bool(wanted.isfinite().all()) == bool(found.isfinite().all())
    off, largest = float((found - wanted).abs().max()), float(wanted.abs().max())
    return off <= 10 * allowed * largest + 1e-9
