"""Distributed Muon: each momentum matrix is gathered on one rank, orthogonalized there, and scattered back."""

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dist_llm.optim.muon import orthogonalize
from dist_llm.parallel.mesh import stage_group
from dist_llm.sharded import local_with_offset, to_local

ShardBox = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape of a rank's shard in a matrix


class DistributedOrthogonalize:
    """An `Orthogonalize` of DTensors. Each matrix has an owner rank; the work is balanced over the ranks.

    Two all-to-alls move each element once in each direction. The gathered momentum has the compute dtype, bf16 or fp32:
    bf16 halves the traffic, and the Newton-Schulz iteration runs in this dtype.
    """

    def __init__(self, mesh: DeviceMesh, matrices: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.group, self.dtype, self.device = stage_group(mesh), dtype, mesh.device_type
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.shapes = [tuple(matrix.shape) for matrix in matrices]
        boxes: list[list[ShardBox]] = [[]] * self.ranks  # per rank and matrix
        local_boxes = [(offset, tuple(shard.shape)) for shard, offset in map(local_with_offset, matrices)]
        dist.all_gather_object(boxes, local_boxes, self.group)
        owners = self._assign_matrices()
        self.owned = [index for index, owner in enumerate(owners) if owner == self.rank]
        sources = [_source_ranks([rank_boxes[i] for rank_boxes in boxes], owner) for i, owner in enumerate(owners)]
        peers = range(self.ranks)
        owned_by = [[index for index, owner in enumerate(owners) if owner == peer] for peer in peers]
        # All four are lists by peer. send_in: indices of the peer's matrices of which this rank sends its shard.
        # recv_in: (index, box) of the peer's shards of this rank's matrices. send_out and recv_out: the way back.
        self.send_in = [[i for i in owned_by[peer] if self.rank in sources[i]] for peer in peers]
        self.recv_in = [[(i, boxes[peer][i]) for i in self.owned if peer in sources[i]] for peer in peers]
        self.send_out = [[(i, boxes[peer][i]) for i in self.owned] for peer in peers]
        self.recv_out = [[(i, boxes[self.rank][i]) for i in owned_by[peer]] for peer in peers]

    def __call__(self, updates: Sequence[Tensor]) -> Sequence[Tensor]:
        """Orthogonalize each update in place."""
        shards = [to_local(update) for update in updates]
        full = {index: shards[index].new_empty(self.shapes[index], dtype=self.dtype) for index in self.owned}
        for (index, box), shard in self._all_to_all([[shards[i] for i in peer] for peer in self.send_in], self.recv_in):
            _box_view(full[index], box).copy_(shard)
        results = dict(zip(self.owned, orthogonalize(list(full.values())), strict=True))
        outputs = [[_box_view(results[index], box) for index, box in peer] for peer in self.send_out]
        for (index, _), shard in self._all_to_all(outputs, self.recv_out):
            shards[index].copy_(shard)
        return updates

    def _assign_matrices(self) -> list[int]:
        """Return the owner rank of each matrix: the most expensive matrix first, each to the least loaded rank."""
        load, owners = [0] * self.ranks, [0] * len(self.shapes)
        cost = [prod(shape) * min(shape) for shape in self.shapes]
        for index in sorted(range(len(cost)), key=cost.__getitem__, reverse=True):
            owners[index] = load.index(min(load))
            load[owners[index]] += cost[index]
        return owners

    def _all_to_all(
        self, send: Sequence[Sequence[Tensor]], recv: Sequence[Sequence[tuple[int, ShardBox]]]
    ) -> list[tuple[tuple[int, ShardBox], Tensor]]:
        """Send `send[peer]` to each peer. Return the received shards that `recv[peer]` lists, with their labels."""
        labels = [label for peer in recv for label in peer]
        empty = torch.empty(0, dtype=self.dtype, device=self.device)
        send_buffer = torch.cat([empty, *(shard.to(self.dtype).flatten() for peer in send for shard in peer)])
        recv_sizes = [[prod(shape) for _, (_, shape) in peer] for peer in recv]
        recv_buffer = send_buffer.new_empty(sum(map(sum, recv_sizes)))
        send_counts = [sum(shard.numel() for shard in peer) for peer in send]
        dist.all_to_all_single(recv_buffer, send_buffer, list(map(sum, recv_sizes)), send_counts, group=self.group)
        shards = recv_buffer.split([size for peer in recv_sizes for size in peer])
        return [(label, shard.view(label[1][1])) for label, shard in zip(labels, shards, strict=True)]


def _source_ranks(boxes: Sequence[ShardBox], owner: int) -> set[int]:
    """Return ranks whose shards cover a matrix, each element once. The owner's own shard is used if it has one."""
    rank_of_box: dict[ShardBox, int] = {}
    for peer in (owner, *range(len(boxes))):
        rank_of_box.setdefault(boxes[peer], peer)
    return set(rank_of_box.values())


def _box_view(matrix: Tensor, box: ShardBox) -> Tensor:
    (row, column), (rows, columns) = box
    return matrix[row : row + rows, column : column + columns]
