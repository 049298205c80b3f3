"""Initialize a run's weights from a checkpoint of another run, whose vocabulary may differ.

An objective adds ids (masks, sentinels, modes) after the tokenizer's ids. Rows of ids that the checkpoint knows are
copied from the checkpoint. Rows of new ids keep their initial values.
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
    path: Path, state: CheckpointState, moments: bool, known_ids: int, added: Collection[str] = ()
) -> None:
    """Read this rank's weights, and the moments if `moments`, from a checkpoint that knows the first `known_ids` ids.

    Parameters in `added` keep their initial values. Raises CheckpointError if the checkpoint lacks another parameter of
    the model, or has it in another shape.
    """
    saved = read_shapes(path)
    tensors = {name: tensor for name, tensor in state.weights().items() if name not in added}
    if moments:
        if added:
            raise CheckpointError(
                f"init_optimizer: keep: {path} has no optimizer state of {min(added).removeprefix('model.')}, which "
                "init_allow adds to the model; set init_optimizer: fresh"
            )
        state.allocate_moments(saved)
        tensors |= state.moments()
    vocab_tensors = {
        name: tensor for name, tensor in tensors.items() if name.split(".", 1)[1].startswith(VOCAB_TENSORS)
    }
    vocab_tensors = {name: tensor for name, tensor in vocab_tensors.items() if tensor.ndim and name in saved}
    rest = {name: tensor for name, tensor in tensors.items() if name not in vocab_tensors}
    check_shapes(path, rest, saved)
    # Read the full table on each rank: the rows may lie on other ranks than in the model.
    full_tables = {name: torch.empty(saved[name]) for name in vocab_tensors}
    read_tensors(path, rest | full_tables)
    for name, table in vocab_tensors.items():
        _copy_rows(table, full_tables[name][:known_ids])
    state.after_load()


def _copy_rows(table: Any, known: Tensor) -> None:
    """Copy this rank's rows of `known` into `table`."""
    for (first, *columns), chunk in local_chunks(table):
        rows = known[first : first + len(chunk)]
        for dimension, start in enumerate(columns, 1):
            rows = rows.narrow(dimension, start, chunk.shape[dimension])
        chunk[: len(rows)] = rows.to(chunk.device)
