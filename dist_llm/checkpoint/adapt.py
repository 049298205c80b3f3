"""Starting a run from another run's weights, whose vocabulary may be another.

An objective brings ids of its own (masks, sentinels, modes), which come after the tokenizer's. Rows of ids that the
checkpoint knows are taken from it; those of new ids keep the initial values that any run gives them.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_llm.checkpoint.boxes import placed
from dist_llm.checkpoint.state import State
from dist_llm.checkpoint.store import read, refuse_other_model, shapes
from dist_llm.errors import CheckpointError

ROWS_OF_IDS = ("embed.tokens.weight", "head.out.weight", "head.bias")


@torch.no_grad()
def start_from(path: Path, held: State, moments: bool, known_ids: int, added: Collection[str] = ()) -> None:
    """Set the initial values that the ranks hold, and the moments if they are wanted, from a checkpoint that knows
    the first `known_ids` ids. Parameters `added` keep their initial values.

    Raises CheckpointError where it lacks another parameter of the model, or has it in another shape.
    """
    saved = shapes(path)
    state = {name: tensor for name, tensor in held.weights().items() if name not in added}
    if moments:
        if added:
            raise CheckpointError(
                f"init_optimizer: keep: {path} has no optimizer state of {min(added).removeprefix('model.')}, which "
                "init_allow adds to the model; set init_optimizer: fresh"
            )
        held.allocate_moments(saved)
        state |= held.moments()
    tables = {name: tensor for name, tensor in state.items() if name.split(".", 1)[1].startswith(ROWS_OF_IDS)}
    tables = {name: tensor for name, tensor in tables.items() if tensor.ndim and name in saved}
    rest = {name: tensor for name, tensor in state.items() if name not in tables}
    refuse_other_model(path, rest, saved)
    # Whole, on every rank: rows need not lie where they will be.
    whole = {name: torch.empty(saved[name]) for name in tables}
    read(path, rest | whole)
    for name, table in tables.items():
        _copy_rows(table, whole[name][:known_ids])
    held.settle()


def _copy_rows(table: Any, known: Tensor) -> None:
    """What this rank has of `known`."""
    for (first, *columns), mine in placed(table):
        rows = known[first : first + len(mine)]
        for dimension, start in enumerate(columns, 1):
            rows = rows.narrow(dimension, start, mine.shape[dimension])
        mine[: len(rows)] = rows.to(mine.device)
