"""Check that replicas of the weights are bitwise equal, by comparing one digest per parameter and rank."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Pairs of (process group of the replicas, or None for all ranks; {parameter name: local tensor}).
ReplicaGroups = Sequence[tuple[Any, Mapping[str, Tensor]]]
CHUNK_ELEMENTS = 1 << 24  # elements that are summed at once; the int64 copies of these elements have 128 MiB
MAX_LINES = 4  # maximum number of parameters that a message names


def find_mismatches(replica_groups: ReplicaGroups, host: str) -> list[str]:
    """Return lines that name the parameters and ranks that differ; an empty list if all replicas agree.

    All ranks return the same lines. `host` is the name of this rank's node.
    """
    lines = [line for group, tensors in replica_groups for line in _iter_mismatches(group, tensors)]
    any_mismatch = torch.tensor(int(bool(lines)))
    if not dist.is_initialized():
        return []
    device = next((tensor.device for _, tensors in replica_groups for tensor in tensors.values()), any_mismatch.device)
    dist.all_reduce(any_mismatch := any_mismatch.to(device), dist.ReduceOp.MAX)
    if not any_mismatch:
        return []
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, (lines, host))
    hosts = "; ".join(f"rank {rank} is on {name}" for rank, (rank_lines, name) in enumerate(by_rank) if rank_lines)
    all_lines = sorted({line for rank_lines, _ in by_rank for line in rank_lines})
    more = [f"and {len(all_lines) - MAX_LINES} more"] if len(all_lines) > MAX_LINES else []
    return [*all_lines[:MAX_LINES], *more, hosts]


def _iter_mismatches(group: Any, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Yield a line for each parameter whose replicas differ. The line names the ranks that differ from the majority.

    If no two ranks agree, the line names all ranks.
    """
    digests = torch.stack([compute_digest(tensor) for tensor in tensors.values()])
    gathered = [torch.empty_like(digests) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, digests, group=group)
    ranks = dist.get_process_group_ranks(group)
    by_rank = torch.stack(gathered).tolist()
    for index, name in enumerate(tensors):
        param_digests = [rank_digests[index] for rank_digests in by_rank]
        majority_digest, num_equal = Counter(param_digests).most_common(1)[0]
        if num_equal == len(param_digests):
            continue
        mismatching_ranks = [
            rank
            for rank, digest in zip(ranks, param_digests, strict=True)
            if digest != majority_digest or num_equal == 1
        ]
        yield f"{name}: differs on rank {', '.join(map(str, mismatching_ranks))} of ranks {', '.join(map(str, ranks))}"


def compute_digest(tensor: Tensor) -> Tensor:
    """Return the sum of all elements, with the bits of each element read as an integer: an int64, [].

    A single flipped bit always changes the sum.
    """
    bits = tensor.detach().reshape(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    chunk_sums = [chunk.sum(dtype=torch.int64) for chunk in torch.split(bits, CHUNK_ELEMENTS)]
    return torch.stack(chunk_sums).sum()
