"""Initialize the weights of a run from a checkpoint of another run, whose vocabulary may differ.

An objective adds token ids (masks, sentinels, modes) after the ids of the tokenizer. Embedding and head have one row
per id. Rows of ids that the checkpoint knows are copied. Rows of new ids keep their initial values.

A dense feed-forward layer of the checkpoint may become a layer with experts. Each expert is then a copy of it.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dist_llm.checkpoint.checkpoint_state import CheckpointState
from dist_llm.checkpoint.flat_shard import local_chunks
from dist_llm.checkpoint.load_checkpoint import check_shapes, fill_tensors, read_shapes
from dist_llm.errors import CheckpointError


@torch.no_grad()
def init_from_checkpoint(
    path: Path,
    state: CheckpointState,
    *,
    with_moments: bool,
    num_known_ids: int,
    vocab_params: Sequence[str],
    added: Collection[str] = (),
    dense_sources: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Read the weights of this rank, and the moments if `with_moments`, from a checkpoint of another run.

    - `num_known_ids`: the checkpoint knows the first of the token ids, up to this number.
    - `vocab_params`: names of the parameters with one row per token id.
    - `added`: parameters that the checkpoint lacks, and that keep their initial values.
    - `dense_sources`: {parameter of all experts: parameter of the dense layer in the checkpoint that each expert
      becomes a copy of}.

    Raises CheckpointError if the checkpoint lacks another parameter of the model, or has it in another shape.
    """
    saved = read_shapes(path)
    weights = state.weights()
    tensors = {name: tensor for name, tensor in weights.items() if name not in added and name not in dense_sources}
    if with_moments:
        if new_names := [*added, *dense_sources]:
            raise CheckpointError(
                f"init_optimizer: keep: {path} has no optimizer state of {min(new_names).removeprefix('model.')}, "
                "which init_allow adds to the model; set init_optimizer: fresh"
            )
        state.allocate_moments(saved)
        tensors |= state.moments()
    vocab_tensors = {
        name: tensor
        for name, tensor in tensors.items()
        if name.split(".", 1)[1].startswith(tuple(vocab_params)) and tensor.ndim and name in saved
    }
    other_tensors = {name: tensor for name, tensor in tensors.items() if name not in vocab_tensors}
    check_shapes(path, other_tensors, saved)
    # Each rank reads the full tables, because its rows in the model may differ from its rows in the checkpoint.
    full_tables = {name: torch.empty(saved[name]) for name in vocab_tensors}
    experts = {name: tensor for name, tensor in weights.items() if name in dense_sources}
    dense_tensors = {dense_sources[name]: torch.empty(tensor.shape[1:]) for name, tensor in experts.items()}
    check_shapes(path, dense_tensors, saved)
    fill_tensors(path, other_tensors | full_tables | dense_tensors)
    for name, table in vocab_tensors.items():
        _copy_rows(table, full_tables[name][:num_known_ids])
    for name, tensor in experts.items():
        _copy_rows(tensor, dense_tensors[dense_sources[name]].expand(tensor.shape))
    state.after_load()


def _copy_rows(table: Any, known_rows: Tensor) -> None:
    """Copy those of `known_rows` that this rank has to the beginning of `table`, a tensor or DTensor with more rows."""
    for (first_row, *column_offsets), chunk in local_chunks(table):
        rows = known_rows[first_row : first_row + len(chunk)]
        for dimension, start in enumerate(column_offsets, 1):
            rows = rows.narrow(dimension, start, chunk.shape[dimension])
        chunk[: len(rows)] = rows.to(chunk.device)
