"""Distributed Muon: orthogonalize updates that are sharded over ranks, as the native engine does with several ranks.

One rank owns each matrix: it gathers the shards of the update, orthogonalizes the matrix, and scatters the result.
"""

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dist_llm.optim.muon import orthogonalize
from dist_llm.parallel.mesh import get_stage_group
from dist_llm.sharded import local_with_offset, to_local

ShardBox = tuple[tuple[int, ...], tuple[int, ...]]  # (offset, shape) of the shard of a rank in a matrix
ShardLabel = tuple[int, ShardBox]  # (index of the matrix, box of the shard in the matrix)


class DistributedOrthogonalizer:
    """Orthogonalizes the updates of matrices, which are DTensors. Each matrix has an owner rank.

    One all-to-all sends the shards of the updates to the owners, and a second one sends the results back. The owners
    are chosen to balance the work over the ranks. The owner gathers and orthogonalizes an update in `dtype`: bf16 has
    half the traffic of fp32. The matrices of experts, [E, R, C], are never split, so a rank orthogonalizes its own.
    """

    def __init__(self, mesh: DeviceMesh, matrices: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.group, self.dtype, self.device = get_stage_group(mesh), dtype, mesh.device_type
        self.rank, self.num_ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.is_expert = [matrix.ndim == 3 for matrix in matrices]
        matrices = [matrix for matrix in matrices if matrix.ndim == 2]
        self.shapes = [tuple(matrix.shape) for matrix in matrices]
        boxes: list[list[ShardBox]] = [[]] * self.num_ranks  # boxes[rank][index of the matrix]
        local_boxes = [(offset, tuple(shard.shape)) for shard, offset in map(local_with_offset, matrices)]
        dist.all_gather_object(boxes, local_boxes, self.group)
        owners = self._assign_owners()
        sources = [
            _source_ranks([rank_boxes[index] for rank_boxes in boxes], owner) for index, owner in enumerate(owners)
        ]
        peers = range(self.num_ranks)
        owned_by = [[index for index, owner in enumerate(owners) if owner == peer] for peer in peers]
        self.owned = owned_by[self.rank]
        # The first all-to-all sends shards of updates to the owners: to each peer the shards of the matrices that the
        # peer owns, and from each peer the shards of the matrices that this rank owns.
        self.shards_to_send = [[index for index in owned_by[peer] if self.rank in sources[index]] for peer in peers]
        self.shards_to_receive = [
            [(index, boxes[peer][index]) for index in self.owned if peer in sources[index]] for peer in peers
        ]
        # The second all-to-all sends the results back to all ranks, including those whose equal shards were not sent.
        self.results_to_send = [[(index, boxes[peer][index]) for index in self.owned] for peer in peers]
        self.results_to_receive = [[(index, local_boxes[index]) for index in owned_by[peer]] for peer in peers]

    def __call__(self, updates: Sequence[Tensor]) -> Sequence[Tensor]:
        """Orthogonalize each update in place. `updates` are sharded like the matrices, in the same order."""
        experts = [to_local(update) for update, is_expert in zip(updates, self.is_expert, strict=True) if is_expert]
        for shard, result in zip(experts, orthogonalize(experts, self.dtype), strict=True):
            shard.copy_(result)
        shards = [to_local(update) for update, is_expert in zip(updates, self.is_expert, strict=True) if not is_expert]
        gathered = {index: shards[index].new_empty(self.shapes[index], dtype=self.dtype) for index in self.owned}
        sent_shards = [[shards[index] for index in indices] for indices in self.shards_to_send]
        for (index, box), shard in self._all_to_all(sent_shards, self.shards_to_receive):
            _box_view(gathered[index], box).copy_(shard)
        results = dict(zip(self.owned, orthogonalize(list(gathered.values())), strict=True))
        sent_results = [[_box_view(results[index], box) for index, box in labels] for labels in self.results_to_send]
        for (index, _), shard in self._all_to_all(sent_results, self.results_to_receive):
            shards[index].copy_(shard)
        return updates

    def _assign_owners(self) -> list[int]:
        """Return the owner rank of each matrix.

        The most expensive matrix is assigned first, to the rank with the least work. The cost of a matrix [R, C] is
        R * C * min(R, C), as that of the matrix products of a Newton-Schulz iteration.
        """
        load, owners = [0] * self.num_ranks, [0] * len(self.shapes)
        cost = [prod(shape) * min(shape) for shape in self.shapes]
        for index in sorted(range(len(cost)), key=cost.__getitem__, reverse=True):
            owners[index] = load.index(min(load))
            load[owners[index]] += cost[index]
        return owners

    def _all_to_all(
        self, shards_by_peer: Sequence[Sequence[Tensor]], labels_by_peer: Sequence[Sequence[ShardLabel]]
    ) -> list[tuple[ShardLabel, Tensor]]:
        """Send the shards `shards_by_peer[peer]` to each peer. Return (label, shard) for each shard received.

        `labels_by_peer[peer]` has the labels of the shards that the peer sends to this rank, in the same order.
        """
        labels = [label for peer_labels in labels_by_peer for label in peer_labels]
        no_elements = torch.empty(0, dtype=self.dtype, device=self.device)  # torch.cat raises if its list is empty
        flat_shards = [shard.to(self.dtype).flatten() for shards in shards_by_peer for shard in shards]
        send_buffer = torch.cat([no_elements, *flat_shards])
        send_counts = [sum(shard.numel() for shard in shards) for shards in shards_by_peer]
        shard_sizes = [[prod(shape) for _, (_, shape) in peer_labels] for peer_labels in labels_by_peer]
        receive_counts = list(map(sum, shard_sizes))
        receive_buffer = send_buffer.new_empty(sum(receive_counts))
        dist.all_to_all_single(receive_buffer, send_buffer, receive_counts, send_counts, group=self.group)
        received_shards = receive_buffer.split([size for peer_sizes in shard_sizes for size in peer_sizes])
        return [
            ((index, (offset, shape)), shard.view(shape))
            for (index, (offset, shape)), shard in zip(labels, received_shards, strict=True)
        ]


def _source_ranks(boxes: Sequence[ShardBox], owner: int) -> set[int]:
    """Return the ranks that send their shards of a matrix to its owner. Together these shards have each element once.

    `boxes` has the box of each rank. If several ranks hold the same shard, the owner uses its own copy, or else that of
    the lowest rank.
    """
    rank_of_box: dict[ShardBox, int] = {}
    for rank in (owner, *range(len(boxes))):
        rank_of_box.setdefault(boxes[rank], rank)
    return set(rank_of_box.values())


def _box_view(matrix: Tensor, box: ShardBox) -> Tensor:
    """Return the view of a box in a matrix."""
    (row, column), (num_rows, num_columns) = box
    return matrix[row : row + num_rows, column : column + num_columns]
