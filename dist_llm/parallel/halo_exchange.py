"""The halo exchange of context parallelism: a rank receives only the tokens that the windows of its queries reach.

With a window of W tokens, the queries of a chunk attend to the chunk and to the W - 1 tokens before it, the halo of the
chunk. The halo consists of the last tokens of one or several earlier chunks, which may be on other ranks.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from dist_llm.parallel.mesh import all_to_all_rows, differentiable_collective


def chunks_of_rank(cp_rank: int, cp_size: int) -> tuple[int, int]:
    """Return the numbers of the two chunks of a rank, among the 2 * cp chunks of a sequence."""
    return cp_rank, 2 * cp_size - 1 - cp_rank


def count_halo_tokens(chunk: int, source: int, chunk_tokens: int, window: int) -> int:
    """Return how many tokens of the chunk `source` are in the halo of `chunk`: always its last tokens."""
    if source >= chunk:
        return 0
    tokens_between = (chunk - source - 1) * chunk_tokens
    return min(chunk_tokens, max(0, window - 1 - tokens_between))


def exchange_halos(x: Tensor, window: int, group: dist.ProcessGroup) -> list[Tensor]:
    """Return each of the two chunks of this rank with its halo before it, [halo + S / 2, ...].

    `x` has the tokens of the two chunks, [S, ...]. In backward, the gradients of a halo return to the ranks that own
    its tokens.
    """
    ranks, chunk_tokens = range(group.size()), len(x) // 2
    chunks_by_rank = [chunks_of_rank(rank, group.size()) for rank in ranks]
    local_chunks = chunks_by_rank[group.rank()]

    def count_needed(rank: int, source: int) -> int:
        """Return how many of the last tokens of a chunk another rank needs, for the halos of both of its chunks."""
        if source in chunks_by_rank[rank]:
            return 0
        return max(count_halo_tokens(chunk, source, chunk_tokens, window) for chunk in chunks_by_rank[rank])

    available = dict(zip(local_chunks, x.chunk(2), strict=True))  # chunk -> its tokens, or its last tokens
    sent = [_last(available[chunk], count_needed(rank, chunk)) for rank in ranks for chunk in local_chunks]
    num_sent = [sum(count_needed(rank, chunk) for chunk in local_chunks) for rank in ranks]
    sources = [chunk for rank in ranks if rank != group.rank() for chunk in chunks_by_rank[rank]]
    source_sizes = [count_needed(group.rank(), chunk) for chunk in sources]
    num_received = [sum(count_needed(group.rank(), chunk) for chunk in chunks_by_rank[rank]) for rank in ranks]
    send = partial(all_to_all_rows, num_sent=num_sent, num_received=num_received, group=group)
    send_back = partial(all_to_all_rows, num_sent=num_received, num_received=num_sent, group=group)
    received = differentiable_collective(torch.cat(sent), send, send_back)
    available |= dict(zip(sources, received.split(source_sizes), strict=True))
    return [_join_halo(available, chunk, chunk_tokens, window) for chunk in local_chunks]


def _join_halo(available: dict[int, Tensor], chunk: int, chunk_tokens: int, window: int) -> Tensor:
    """Concatenate the halo of a chunk and the chunk, in the order of the sequence."""
    halo = [_last(available[source], count_halo_tokens(chunk, source, chunk_tokens, window)) for source in range(chunk)]
    return torch.cat((*halo, available[chunk]))


def _last(x: Tensor, num_tokens: int) -> Tensor:
    """Return the last tokens of `x`."""
    return x[len(x) - num_tokens :]
