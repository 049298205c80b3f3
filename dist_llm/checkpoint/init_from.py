"""Starting a run from another run's weights, whose vocabulary may be another.

An objective brings ids of its own (masks, sentinels, modes), which come after the tokenizer's. Rows of ids that the
checkpoint knows are taken from it; those of new ids keep the initial values that any run gives them.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_llm.checkpoint.checkpoint_state import CheckpointState
from dist_llm.checkpoint.flat_shard import local_chunks
from dist_llm.checkpoint.store import check_shapes, read_shapes, read_tensors
from dist_llm.errors import CheckpointError

VOCAB_TENSORS = ("embed.tokens.weight", "head.out.weight", "head.bias")


@torch.no_grad()
def init_from_checkpoint(
    path: Path, held: CheckpointState, moments: bool, known_ids: int, added: Collection[str] = ()
) -> None:
    """Set the initial values that the ranks hold, and the moments if they are wanted, from a checkpoint that knows
    the first `known_ids` ids. Parameters `added` keep their initial values.

    Raises CheckpointError where it lacks another parameter of the model, or has it in another shape.
    """
    saved = read_shapes(path)
    state = {name: tensor for name, tensor in held.weights().items() if name not in added}
    if moments:
        if added:
            raise CheckpointError(
                f"init_optimizer: keep: {path} has no optimizer state of {min(added).removeprefix('model.')}, which "
                "init_allow adds to the model; set init_optimizer: fresh"
            )
        held.allocate_moments(saved)
        state |= held.moments()
    tables = {name: tensor for name, tensor in state.items() if name.split(".", 1)[1].startswith(VOCAB_TENSORS)}
    tables = {name: tensor for name, tensor in tables.items() if tensor.ndim and name in saved}
    rest = {name: tensor for name, tensor in state.items() if name not in tables}
    check_shapes(path, rest, saved)
    # Whole, on every rank: rows need not lie where they will be.
    whole = {name: torch.empty(saved[name]) for name in tables}
    read_tensors(path, rest | whole)
    for name, table in tables.items():
        _copy_rows(table, whole[name][:known_ids])
    held.after_load()


def _copy_rows(table: Any, known: Tensor) -> None:
    """What this rank has of `known`."""
    for (first, *columns), mine in local_chunks(table):
        rows = known[first : first + len(mine)]
        for dimension, start in enumerate(columns, 1):
            rows = rows.narrow(dimension, start, mine.shape[dimension])
        mine[: len(rows)] = rows.to(mine.device)
