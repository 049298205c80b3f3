"""Distributed Muon: gather each sharded momentum matrix on one rank, orthogonalize it there, and scatter the result."""

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dist_llm.optim.muon import orthogonalize
from dist_llm.parallel.mesh import stage_group
from dist_llm.sharded import local_with_offset, to_local

ShardBox = tuple[tuple[int, ...], tuple[int, ...]]  # (offset, shape) of the shard of a rank in a matrix


class DistributedOrthogonalize:
    """Orthogonalizes DTensors. One rank owns each matrix, and the work is balanced over the ranks.

    One all-to-all sends the shards to the owners, a second one sends the results back. The gathered momentum has the
    compute dtype `dtype`, bf16 or fp32. bf16 halves the traffic, and the Newton-Schulz iteration runs in this dtype.
    """

    def __init__(self, mesh: DeviceMesh, matrices: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.group, self.dtype, self.device = stage_group(mesh), dtype, mesh.device_type
        self.rank, self.num_ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.shapes = [tuple(matrix.shape) for matrix in matrices]
        boxes: list[list[ShardBox]] = [[]] * self.num_ranks  # boxes[rank][matrix]
        local_boxes = [(offset, tuple(shard.shape)) for shard, offset in map(local_with_offset, matrices)]
        dist.all_gather_object(boxes, local_boxes, self.group)
        owners = self._assign_matrices()
        self.owned = [index for index, owner in enumerate(owners) if owner == self.rank]
        sources = [_source_ranks([rank_boxes[m] for rank_boxes in boxes], owner) for m, owner in enumerate(owners)]
        peers = range(self.num_ranks)
        owned_by = [[index for index, owner in enumerate(owners) if owner == peer] for peer in peers]
        # Four lists by peer rank; m is the index of a matrix. First all-to-all: this rank sends its shards of the
        # matrices `send_in[peer]`, which the peer owns, and receives the shards `recv_in[peer]` of its own matrices.
        # Second all-to-all: it sends the results `send_out[peer]` of its own matrices, and receives `recv_out[peer]`.
        self.send_in = [[m for m in owned_by[peer] if self.rank in sources[m]] for peer in peers]
        self.recv_in = [[(m, boxes[peer][m]) for m in self.owned if peer in sources[m]] for peer in peers]
        self.send_out = [[(m, boxes[peer][m]) for m in self.owned] for peer in peers]
        self.recv_out = [[(m, boxes[self.rank][m]) for m in owned_by[peer]] for peer in peers]

    def __call__(self, updates: Sequence[Tensor]) -> Sequence[Tensor]:
        """Orthogonalize each update in place."""
        shards = [to_local(update) for update in updates]
        full = {index: shards[index].new_empty(self.shapes[index], dtype=self.dtype) for index in self.owned}
        inputs = [[shards[m] for m in matrices] for matrices in self.send_in]
        for (index, box), shard in self._all_to_all(inputs, self.recv_in):
            _box_view(full[index], box).copy_(shard)
        results = dict(zip(self.owned, orthogonalize(list(full.values())), strict=True))
        outputs = [[_box_view(results[m], box) for m, box in labels] for labels in self.send_out]
        for (index, _), shard in self._all_to_all(outputs, self.recv_out):
            shards[index].copy_(shard)
        return updates

    def _assign_matrices(self) -> list[int]:
        """Return the owner rank of each matrix.

        The most expensive matrix is assigned first, to the least loaded rank.
        """
        load, owners = [0] * self.num_ranks, [0] * len(self.shapes)
        cost = [prod(shape) * min(shape) for shape in self.shapes]
        for index in sorted(range(len(cost)), key=cost.__getitem__, reverse=True):
            owners[index] = load.index(min(load))
            load[owners[index]] += cost[index]
        return owners

    def _all_to_all(
        self, send: Sequence[Sequence[Tensor]], recv: Sequence[Sequence[tuple[int, ShardBox]]]
    ) -> list[tuple[tuple[int, ShardBox], Tensor]]:
        """Send the shards `send[peer]` to each peer. Return (label, shard) for each shard received.

        `recv[peer]` lists the labels (index of the matrix, box) of the shards from a peer.
        """
        labels = [label for peer_labels in recv for label in peer_labels]
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        send_buffer = torch.cat([empty, *(shard.to(self.dtype).flatten() for shards in send for shard in shards)])
        recv_sizes = [[prod(shape) for _, (_, shape) in peer_labels] for peer_labels in recv]
        recv_buffer = send_buffer.new_empty(sum(map(sum, recv_sizes)))
        send_counts = [sum(shard.numel() for shard in shards) for shards in send]
        dist.all_to_all_single(recv_buffer, send_buffer, list(map(sum, recv_sizes)), send_counts, group=self.group)
        flat_shards = recv_buffer.split([size for peer_sizes in recv_sizes for size in peer_sizes])
        return [(label, shard.view(label[1][1])) for label, shard in zip(labels, flat_shards, strict=True)]


def _source_ranks(boxes: Sequence[ShardBox], owner: int) -> set[int]:
    """Return ranks whose shards cover a matrix, each element once.

    Of equal shards, the shard of the owner comes first.
    """
    rank_of_box: dict[ShardBox, int] = {}
    for peer in (owner, *range(len(boxes))):
        rank_of_box.setdefault(boxes[peer], peer)
    return set(rank_of_box.values())


def _box_view(matrix: Tensor, box: ShardBox) -> Tensor:
    """Return the view of a box in a matrix."""
    (row, column), (num_rows, num_columns) = box
    return matrix[row : row + num_rows, column : column + num_columns]
