"""Do ranks that should hold the same weights hold the same bits? A number per parameter, compared."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ReplicaGroups = Sequence[tuple[Any, Mapping[str, Tensor]]]  # (the group of those that hold the same, {name: tensor})
CHUNK_ELEMENTS = 1 << 24  # elements whose sum is taken at a time: it needs 8 bytes for each
MAX_LINES = 4  # lines that a message has


def find_mismatches(replica_groups: ReplicaGroups, host: str) -> list[str]:
    """Lines that name parameters and ranks; none where all is well. On all ranks, which get the same ones."""
    lines = [line for group, tensors in replica_groups for line in _mismatches(group, tensors)]
    any_mismatch = torch.tensor(int(bool(lines)))
    if not dist.is_initialized():
        return []
    device = next((tensor.device for _, tensors in replica_groups for tensor in tensors.values()), any_mismatch.device)
    dist.all_reduce(any_mismatch := any_mismatch.to(device), dist.ReduceOp.MAX)
    if not any_mismatch:
        return []
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, (lines, host))
    hosts = "; ".join(f"rank {rank} is on {name}" for rank, (found, name) in enumerate(every) if found)
    found = sorted({line for lines, _ in every for line in lines})
    return [*found[:MAX_LINES], *([f"and {len(found) - MAX_LINES} more"] if len(found) > MAX_LINES else []), hosts]


def _mismatches(group: Any, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Of each parameter whose copies differ: which ranks hold another one than most."""
    mine = torch.stack([compute_digest(tensor) for tensor in tensors.values()])
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    by_rank = torch.stack(every).tolist()
    for number, name in enumerate(tensors):
        values = [row[number] for row in by_rank]
        majority, times = Counter(values).most_common(1)[0]
        if times == len(values):
            continue
        mismatching = [rank for rank, value in zip(ranks, values, strict=True) if value != majority or times == 1]
        yield f"{name}: differs on rank {', '.join(map(str, mismatching))} of ranks {', '.join(map(str, ranks))}"


def compute_digest(tensor: Tensor) -> Tensor:
    """The sum of the elements' bits as integers, an int64 on the tensor's device: another one if any bit is flipped."""
    bits = tensor.detach().reshape(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    pieces = [piece.sum(dtype=torch.int64) for piece in torch.split(bits, CHUNK_ELEMENTS)]
    return torch.stack(pieces).sum()
