"""Muon on shares of matrices: each is put together on one rank, made orthogonal there, and handed out again."""

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dist_llm.optim.muon import orthogonalized
from dist_llm.parallel.mesh import local_with_offset, stage_group, to_local

ShardBox = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape of a rank's part of a matrix


class DistributedOrthogonalize:
    """An `Orthogonalize` of DTensors. The work is shared out evenly; two exchanges send each element once each way.

    The gathered momentum has the compute type, bf16 or fp32: half the bytes, and the Newton-Schulz steps in it.
    """

    def __init__(self, mesh: DeviceMesh, matrices: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.group, self.dtype, self.device = stage_group(mesh), dtype, mesh.device_type
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.shapes = [tuple(matrix.shape) for matrix in matrices]
        boxes: list[list[ShardBox]] = [[]] * self.ranks
        dist.all_gather_object(
            boxes, [(at, tuple(part.shape)) for part, at in map(local_with_offset, matrices)], self.group
        )
        owners = self._assign_matrices()
        self.owned = [number for number, owner in enumerate(owners) if owner == self.rank]
        source_ranks = [_source_ranks([part[number] for part in boxes], owner) for number, owner in enumerate(owners)]
        peers = range(self.ranks)
        owned_by = [[number for number, owner in enumerate(owners) if owner == peer] for peer in peers]
        # By peer: what this rank gives of the peer's matrices and gets for its own; then, what goes back.
        self.send_in = [[n for n in owned_by[peer] if self.rank in source_ranks[n]] for peer in peers]
        self.recv_in = [[(n, boxes[peer][n]) for n in self.owned if peer in source_ranks[n]] for peer in peers]
        self.send_out = [[(n, boxes[peer][n]) for n in self.owned] for peer in peers]
        self.recv_out = [[(n, boxes[self.rank][n]) for n in owned_by[peer]] for peer in peers]

    def __call__(self, updates: Sequence[Tensor]) -> Sequence[Tensor]:
        """Each update as its owner makes it, in place."""
        parts = [to_local(update) for update in updates]
        full_updates = {number: parts[number].new_empty(self.shapes[number], dtype=self.dtype) for number in self.owned}
        for (number, box), part in self._all_to_all([[parts[n] for n in peer] for peer in self.send_in], self.recv_in):
            _box_view(full_updates[number], box).copy_(part)
        ready = dict(zip(self.owned, orthogonalized(list(full_updates.values())), strict=True))
        cut = [[_box_view(ready[n], box) for n, box in peer] for peer in self.send_out]
        for (number, _), part in self._all_to_all(cut, self.recv_out):
            parts[number].copy_(part)
        return updates

    def _assign_matrices(self) -> list[int]:
        """The owner of each matrix: the dearest first, each to the rank that has least to do."""
        work, owners = [0] * self.ranks, [0] * len(self.shapes)
        cost = [prod(shape) * min(shape) for shape in self.shapes]
        for number in sorted(range(len(cost)), key=cost.__getitem__, reverse=True):
            owners[number] = work.index(min(work))
            work[owners[number]] += cost[number]
        return owners

    def _all_to_all(
        self, sent: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[tuple[int, ShardBox]]]
    ) -> list[tuple[tuple[int, ShardBox], Tensor]]:
        """Hand `sent[peer]` to each; what came of what is `wanted` of each, in the shapes of their boxes."""
        labels = [label for peer in wanted for label in peer]
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        out = torch.cat([nothing, *(part.to(self.dtype).flatten() for peer in sent for part in peer)])
        sizes = [[prod(shape) for _, (_, shape) in peer] for peer in wanted]
        into = out.new_empty(sum(map(sum, sizes)))
        counts = [sum(part.numel() for part in peer) for peer in sent]
        dist.all_to_all_single(into, out, list(map(sum, sizes)), counts, group=self.group)
        pieces = into.split([size for peer in sizes for size in peer])
        return [(label, piece.view(label[1][1])) for label, piece in zip(labels, pieces, strict=True)]


def _source_ranks(boxes: Sequence[ShardBox], owner: int) -> set[int]:
    """Ranks whose parts make up a matrix, each element once: its owner's own part, if it has one."""
    found: dict[ShardBox, int] = {}
    for peer in (owner, *range(len(boxes))):
        found.setdefault(boxes[peer], peer)
    return set(found.values())


def _box_view(matrix: Tensor, box: ShardBox) -> Tensor:
    (row, column), (rows, columns) = box
    return matrix[row : row + rows, column : column + columns]
