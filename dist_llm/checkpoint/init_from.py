"""Initialize the weights of a run from a checkpoint of another run, whose vocabulary may differ.

An objective adds token ids (masks, sentinels, modes) after the ids of the tokenizer. Embedding and head have one row
per id. Rows of ids that the checkpoint knows are copied. Rows of new ids keep their initial values.
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_llm.checkpoint.checkpoint_state import CheckpointState
from dist_llm.checkpoint.flat_shard import local_chunks
from dist_llm.checkpoint.store import check_shapes, fill_tensors, read_shapes
from dist_llm.errors import CheckpointError


@torch.no_grad()
def init_from_checkpoint(
    path: Path,
    state: CheckpointState,
    with_moments: bool,
    num_known_ids: int,
    vocab_params: Sequence[str],
    added: Collection[str] = (),
) -> None:
    """Read the weights of this rank, and the moments if `with_moments`, from a checkpoint of another run.

    The checkpoint knows the first `num_known_ids` token ids. `vocab_params` have one row per token id. Parameters in
    `added` keep their initial values.

    Raises CheckpointError if the checkpoint lacks another parameter of the model, or has it in another shape.
    """
    saved = read_shapes(path)
    tensors = {name: tensor for name, tensor in state.weights().items() if name not in added}
    if with_moments:
        if added:
            raise CheckpointError(
                f"init_optimizer: keep: {path} has no optimizer state of {min(added).removeprefix('model.')}, which "
                "init_allow adds to the model; set init_optimizer: fresh"
            )
        state.allocate_moments(saved)
        tensors |= state.moments()
    vocab_tensors = {
        name: tensor for name, tensor in tensors.items() if name.split(".", 1)[1].startswith(tuple(vocab_params))
    }
    vocab_tensors = {name: tensor for name, tensor in vocab_tensors.items() if tensor.ndim and name in saved}
    other_tensors = {name: tensor for name, tensor in tensors.items() if name not in vocab_tensors}
    check_shapes(path, other_tensors, saved)
    # Each rank reads the full tables, because its rows in the model may differ from its rows in the checkpoint.
    full_tables = {name: torch.empty(saved[name]) for name in vocab_tensors}
    fill_tensors(path, other_tensors | full_tables)
    for name, table in vocab_tensors.items():
        _copy_rows(table, full_tables[name][:num_known_ids])
    state.after_load()


def _copy_rows(table: Any, known_rows: Tensor) -> None:
    """Copy the rows of this rank from `known_rows` to `table`."""
    for (first_row, *column_offsets), chunk in local_chunks(table):
        rows = known_rows[first_row : first_row + len(chunk)]
        for dimension, start in enumerate(column_offsets, 1):
            rows = rows.narrow(dimension, start, chunk.shape[dimension])
        chunk[: len(rows)] = rows.to(chunk.device)
