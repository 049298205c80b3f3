"""Context parallelism: each rank holds a part of every sequence and gathers the others' keys and values.

Sequences are cut into 2 * cp pieces and rank r holds pieces r and 2 * cp - 1 - r: under the causal
mask an early piece sees little and a late one much, so every rank does the same work.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from dist_llm.models.attention import AttentionKernel, attend
from dist_llm.models.decoder import Decoder
from dist_llm.models.visibility import Visibility
from dist_llm.objectives.batch import Batch, count_scored
from dist_llm.parallel.mesh import all_gather, differentiable_collective, reduce_scatter


def apply_context_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Put the gathering kernel into every attention of `model`; `mesh` is the cp axis."""
    for block in model.blocks.values():
        attention = block.attention
        attention.kernel = AllGatherAttention(attention.kernel, mesh)  # type: ignore[union-attr, arg-type]


def shard_sequences(batch: Batch, rank: int, ranks: int) -> Batch:
    """This rank's two pieces of each sequence, with the positions they have in the whole."""
    if ranks == 1:
        return batch
    batch = batch.to(batch.inputs_BS.device)  # widened: unsigned ids cannot be compared with IGNORE
    B, S = batch.inputs_BS.shape
    places_BS = torch.arange(S).expand(B, S)
    positions_BS = batch.positions_BS if batch.positions_BS is not None else places_BS

    def cut(tensor_BS: Tensor) -> Tensor:
        pieces = tensor_BS.chunk(2 * ranks, dim=1)
        return torch.cat((pieces[rank], pieces[2 * ranks - 1 - rank]), dim=1)

    targets_BS = cut(batch.targets_BS)
    return replace(
        batch,
        inputs_BS=cut(batch.inputs_BS),
        targets_BS=targets_BS,
        positions_BS=cut(positions_BS),
        visible=batch.visible.at(cut(places_BS), S),
        scored=count_scored(targets_BS),
    )


class AllGatherAttention(nn.Module):
    """Attention of this rank's queries to the keys and values of the whole sequence."""

    def __init__(self, kernel: AttentionKernel, mesh: DeviceMesh) -> None:
        super().__init__()
        self.dropout, self.scale = kernel.dropout, kernel.scale
        self.group, self.rank, self.ranks = mesh.get_group(), mesh.get_local_rank(), mesh.size()

    def forward(self, q_BSHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor, visible: Visibility) -> Tensor:
        """[B, S/cp, H, E] -> the same: the rows of whole attention that belong to this rank."""
        dropout = self.dropout if self.training else 0.0
        k_BTKE, v_BTKE = self._gather(k_BSKE, v_BSKE)
        if visible.mask is not None or not visible.causal:
            return attend(q_BSHE, k_BTKE, v_BTKE, visible, dropout, self.scale)
        piece = q_BSHE.shape[1] // 2
        outputs = []
        for q_piece, number in zip(q_BSHE.chunk(2, dim=1), (self.rank, 2 * self.ranks - 1 - self.rank), strict=True):
            end = (number + 1) * piece  # a piece's queries are the last of what they see
            outputs.append(attend(q_piece, k_BTKE[:, :end], v_BTKE[:, :end], visible, dropout, self.scale))
        return torch.cat(outputs, dim=1)

    def _gather(self, k_BSKE: Tensor, v_BSKE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of all ranks in one collective, back in the order of the sequence."""
        both = torch.stack((k_BSKE, v_BSKE))  # [2, B, S/cp, K, E]
        forward_fn, backward_fn = partial(all_gather, group=self.group), partial(reduce_scatter, group=self.group)
        ranks = differentiable_collective(both, forward_fn, backward_fn).chunk(self.ranks)
        halves = [rank.chunk(2, dim=2) for rank in ranks]
        pieces = [early for early, _ in halves] + [late for _, late in reversed(halves)]
        k_BTKE, v_BTKE = torch.cat(pieces, dim=2).unbind(0)
        return k_BTKE, v_BTKE
