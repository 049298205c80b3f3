"""Bring tokens to the experts that they have chosen. Here one process has all tokens and all experts.

`parallel/expert_parallel.py` has the dispatcher for several ranks.

Shape suffixes: B sequences of S tokens, N tokens that this rank routes, R = N * top_k rows: a copy of each token for
each of its experts; E experts, e experts of this rank, D d_model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DispatchedRows:
    """The rows for the experts of this rank."""

    rows_RD: Tensor  # sorted by expert
    counts_e: Tensor  # rows of each expert
    return_rows: Callable[[Tensor], Tensor]  # brings the outputs back, to the order before the dispatch


class LocalTokenDispatcher:
    """The dispatcher of one process, and the interface of all dispatchers."""

    # Ranks that hold tokens of the same sequences: context-parallel and tensor-parallel ranks.
    num_sequence_shards = 1

    def shard_tokens(self, x_BSD: Tensor) -> Tensor:
        """Return the tokens that this rank routes, [N, D]."""
        return x_BSD.flatten(0, 1)

    def gather_tokens(self, y_ND: Tensor, x_BSD: Tensor) -> Tensor:
        """Undo `shard_tokens(x_BSD)` for the outputs: [N, D] -> [B, S, D]."""
        return y_ND.view_as(x_BSD)

    def sequence_ids(self, num_tokens: int, num_sequences: int, device: torch.device) -> Tensor:
        """Return the index of the sequence of each token of this rank, [N]."""
        return torch.arange(num_tokens, device=device) // (num_tokens // num_sequences)

    def all_reduce_counts(self, counts_BE: Tensor) -> Tensor:
        """Sum counts of the sequences over the ranks that hold tokens of them."""
        return counts_BE

    def dispatch(self, rows_RD: Tensor, counts_E: Tensor) -> DispatchedRows:
        """Send rows, which are sorted by expert, to the ranks of the experts. `counts_E`: rows for each expert."""
        return DispatchedRows(rows_RD, counts_E, lambda outputs_RD: outputs_RD)
