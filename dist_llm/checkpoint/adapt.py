"""Starting a run from another run's weights, whose vocabulary may be another.

An objective brings ids of its own (masks, sentinels, modes), which come after the tokenizer's. Rows of ids that the
checkpoint knows are taken from it; those of new ids keep the initial values that any run gives them.
"""

from pathlib import Path

import torch
from torch import Tensor, optim
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_llm.checkpoint.state import Named, allocate_moments, copy_to_twins, moments, weights
from dist_llm.checkpoint.store import read, refuse_other_model, shapes
from dist_llm.parallel.mesh import local

ROWS_OF_IDS = ("embed.tokens.weight", "head.out.weight", "head.bias")


@torch.no_grad()
def start_from(path: Path, model: Named, optimizer: optim.Optimizer | None, known_ids: int) -> None:
    """Set `model` (with its initial values), and the moments if there is an optimizer, from a checkpoint that knows
    the first `known_ids` ids.

    Raises CheckpointError where it lacks a parameter of the model, or has it in another shape.
    """
    saved = shapes(path)
    state = weights(model)
    if optimizer is not None:
        allocate_moments(model, optimizer, {name: shape for name, shape in saved.items() if name.startswith("optim.")})
        state |= moments(model, optimizer)
    tables = {name: tensor for name, tensor in state.items() if name.split(".", 1)[1].startswith(ROWS_OF_IDS)}
    tables = {name: tensor for name, tensor in tables.items() if tensor.ndim and name in saved}
    rest = {name: tensor for name, tensor in state.items() if name not in tables}
    refuse_other_model(path, rest, saved)
    # Whole, on every rank: rows need not lie where they will be.
    whole = {name: torch.empty(saved[name]) for name in tables}
    read(path, rest | whole)
    for name, tensor in tables.items():
        _copy_rows(tensor, whole[name][:known_ids])
    copy_to_twins(model, optimizer)


def _copy_rows(tensor: Tensor, known: Tensor) -> None:
    """The rows that this rank has of `known`."""
    first = 0
    if isinstance(tensor, DTensor):
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        first = offset[0]
    mine = local(tensor)
    rows = known[first : first + len(mine)]
    mine[: len(rows)] = rows.to(mine.device)
