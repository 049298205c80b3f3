"""Context parallelism (cp): each rank holds a part of every sequence, and ranks exchange keys and values.

A sequence is split into 2 * cp chunks, and rank r holds the chunks r and 2 * cp - 1 - r. Under a causal mask an early
chunk attends to few keys and a late chunk to many, so every rank does the same work.

Keys and values are all-gathered. On a CPU, a layer with a window receives only those that the window reaches
(halo_exchange.py).

Shapes: B sequences, S tokens of a rank (or of the full sequence, before `shard_sequences`), T tokens of the full
sequence, H query heads, K key-value heads, E head dimension.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dist_llm.models.attention import AttentionKernel, scaled_dot_product
from dist_llm.models.attention_mask import AttentionMask
from dist_llm.models.decoder import Decoder
from dist_llm.objectives.batch import Batch, count_valid_tokens
from dist_llm.parallel.halo_exchange import chunks_of_rank, exchange_halos
from dist_llm.parallel.mesh import all_gather, differentiable_collective, reduce_scatter


def apply_context_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Replace each attention kernel in `model` by a ContextParallelAttention. `mesh` has only the axis cp."""
    for block in model.blocks.values():
        if (attention := block.attention) is not None:  # `check` refuses mixers that do not support this
            attention.kernel = ContextParallelAttention(attention.kernel, mesh)  # type: ignore[union-attr, arg-type]


def shard_sequences(batch: Batch, cp_rank: int, cp_size: int) -> Batch:
    """Return the two chunks of each sequence on this rank, [B, S / cp], with their positions in the full sequence."""
    if cp_size == 1:
        return batch
    # `to` converts unsigned ids to int64. Unsigned ids cannot be compared with IGNORE_INDEX.
    batch = batch.to(batch.inputs_BS.device)
    B, S = batch.inputs_BS.shape
    indices_BS = torch.arange(S).expand(B, S)
    positions_BS = batch.positions_BS if batch.positions_BS is not None else indices_BS

    def select_chunks(tensor_BS: Tensor) -> Tensor:
        chunks = tensor_BS.chunk(2 * cp_size, dim=1)
        return torch.cat([chunks[chunk] for chunk in chunks_of_rank(cp_rank, cp_size)], dim=1)

    targets_BS = select_chunks(batch.targets_BS)
    local_batch = replace(
        batch,
        inputs_BS=select_chunks(batch.inputs_BS),
        targets_BS=targets_BS,
        positions_BS=select_chunks(positions_BS),
        mask=batch.mask.with_query_positions(select_chunks(indices_BS), S),
        num_valid_tokens=count_valid_tokens(targets_BS),
    )
    if batch.loss_weights_BS is None:
        return local_batch
    return local_batch.with_loss_weights(select_chunks(batch.loss_weights_BS))


class ContextParallelAttention(nn.Module):
    """Attention of the queries of this rank to the keys and values of the full sequence."""

    def __init__(self, kernel: AttentionKernel, mesh: DeviceMesh) -> None:
        super().__init__()
        self.dropout, self.scale, self.cap = kernel.dropout, kernel.scale, kernel.cap
        self.group, self.cp_size = mesh.get_group(), mesh.size()
        self.chunks = chunks_of_rank(mesh.get_local_rank(), mesh.size())

    def forward(
        self, q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, mask: AttentionMask, sinks_H: Tensor | None = None
    ) -> Tensor:
        """Return the attention output of the queries of this rank, [B, S, H, E]."""
        dropout = self.dropout if self.training else 0.0
        if mask.window and mask.materialized is None:
            keys_and_values = self._exchange_halos(k_BSKE, v_BSKE, mask.window)
        else:
            k_BTKE, v_BTKE = self._all_gather_keys_and_values(k_BSKE, v_BSKE)
            if mask.materialized is not None or not mask.causal:
                return scaled_dot_product(q_BSHE, k_BTKE, v_BTKE, mask, dropout, self.scale, self.cap, sinks_H)
            chunk_tokens = q_BSHE.shape[1] // 2
            keys_and_values = [
                (k_BTKE[:, : (chunk + 1) * chunk_tokens], v_BTKE[:, : (chunk + 1) * chunk_tokens])
                for chunk in self.chunks
            ]
        outputs = []
        for q_chunk, chunk, (keys, values) in zip(q_BSHE.chunk(2, dim=1), self.chunks, keys_and_values, strict=True):
            end = (chunk + 1) * q_chunk.shape[1]  # the last query is aligned with the last key
            chunk_mask = mask.select_keys(slice(end - keys.shape[1], end))
            outputs.append(
                scaled_dot_product(q_chunk, keys, values, chunk_mask, dropout, self.scale, self.cap, sinks_H)
            )
        return torch.cat(outputs, dim=1)

    def _exchange_halos(self, k_BSKE: Tensor, v_BSKE: Tensor, window: int) -> list[tuple[Tensor, Tensor]]:
        """Return the keys and values that the queries of each chunk attend to, [B, halo + S / 2, K, E] each."""
        local = torch.stack((k_BSKE, v_BSKE)).movedim(2, 0)  # [S, 2, B, K, E]
        chunks = exchange_halos(local, window, self.group)
        return [(chunk[:, 0].movedim(0, 1), chunk[:, 1].movedim(0, 1)) for chunk in chunks]

    def _all_gather_keys_and_values(self, k_BSKE: Tensor, v_BSKE: Tensor) -> tuple[Tensor, Tensor]:
        """All-gather keys and values in one collective, and restore the order of the sequence: [B, T, K, E] each."""
        local = torch.stack((k_BSKE, v_BSKE))  # [2, B, S, K, E]
        forward_fn, backward_fn = partial(all_gather, group=self.group), partial(reduce_scatter, group=self.group)
        by_rank = differentiable_collective(local, forward_fn, backward_fn).chunk(self.cp_size)
        chunk_pairs = [rank_tensor.chunk(2, dim=2) for rank_tensor in by_rank]
        chunks = [early for early, _ in chunk_pairs] + [late for _, late in reversed(chunk_pairs)]
        k_BTKE, v_BTKE = torch.cat(chunks, dim=2).unbind(0)
        return k_BTKE, v_BTKE
