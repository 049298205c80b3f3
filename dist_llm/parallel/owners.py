"""Muon on shares of matrices: each is put together on one rank, made orthogonal there, and handed out again."""

from collections.abc import Sequence
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dist_llm.optim.muon import orthogonalized
from dist_llm.parallel.mesh import local, place, stage_group

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape of a rank's part of a matrix


class Owners:
    """An `Orthogonalize` of DTensors. The work is shared out evenly; two exchanges send each element once each way.

    The gathered momentum has the compute type, bf16 or fp32: half the bytes, and the Newton-Schulz steps in it.
    """

    def __init__(self, mesh: DeviceMesh, matrices: Sequence[Tensor], dtype: torch.dtype) -> None:
        self.group, self.dtype, self.device = stage_group(mesh), dtype, mesh.device_type
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.shapes = [tuple(matrix.shape) for matrix in matrices]
        boxes: list[list[Box]] = [[]] * self.ranks
        dist.all_gather_object(boxes, [(at, tuple(part.shape)) for part, at in map(place, matrices)], self.group)
        owners = self._share_out()
        self.mine = [number for number, owner in enumerate(owners) if owner == self.rank]
        sources = [_sources([part[number] for part in boxes], owner) for number, owner in enumerate(owners)]
        peers = range(self.ranks)
        theirs = [[number for number, owner in enumerate(owners) if owner == peer] for peer in peers]
        # By peer: what this rank gives of the peer's matrices and gets for its own; then, what goes back.
        self.given = [[n for n in theirs[peer] if self.rank in sources[n]] for peer in peers]
        self.gotten = [[(n, boxes[peer][n]) for n in self.mine if peer in sources[n]] for peer in peers]
        self.returned = [[(n, boxes[peer][n]) for n in self.mine] for peer in peers]
        self.received = [[(n, boxes[self.rank][n]) for n in theirs[peer]] for peer in peers]

    def __call__(self, updates: Sequence[Tensor]) -> Sequence[Tensor]:
        """Each update as its owner makes it, in place."""
        parts = [local(update) for update in updates]
        whole = {number: parts[number].new_empty(self.shapes[number], dtype=self.dtype) for number in self.mine}
        for (number, box), part in self._exchange([[parts[n] for n in peer] for peer in self.given], self.gotten):
            _inside(whole[number], box).copy_(part)
        ready = dict(zip(self.mine, orthogonalized(list(whole.values())), strict=True))
        cut = [[_inside(ready[n], box) for n, box in peer] for peer in self.returned]
        for (number, _), part in self._exchange(cut, self.received):
            parts[number].copy_(part)
        return updates

    def _share_out(self) -> list[int]:
        """The owner of each matrix: the dearest first, each to the rank that has least to do."""
        work, owners = [0] * self.ranks, [0] * len(self.shapes)
        cost = [prod(shape) * min(shape) for shape in self.shapes]
        for number in sorted(range(len(cost)), key=cost.__getitem__, reverse=True):
            owners[number] = work.index(min(work))
            work[owners[number]] += cost[number]
        return owners

    def _exchange(
        self, sent: Sequence[Sequence[Tensor]], wanted: Sequence[Sequence[tuple[int, Box]]]
    ) -> list[tuple[tuple[int, Box], Tensor]]:
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


def _sources(boxes: Sequence[Box], owner: int) -> set[int]:
    """Ranks whose parts make up a matrix, each element once: its owner's own part, if it has one."""
    found: dict[Box, int] = {}
    for peer in (owner, *range(len(boxes))):
        found.setdefault(boxes[peer], peer)
    return set(found.values())


def _inside(matrix: Tensor, box: Box) -> Tensor:
    (row, column), (rows, columns) = box
    return matrix[row : row + rows, column : column + columns]
