"""Planted bugs of windows under context parallelism. bugs.py explains planted bugs."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dist_llm.models.attention_mask import AttentionMask
from dist_llm.parallel import halo_exchange
from dist_llm.parallel.mesh import all_to_all_rows, differentiable_collective
from tests.laws.bugs import register_bug


@register_bug
def halos_are_one_token_short() -> Iterator[Any]:
    """The first query of a chunk does not attend to the first token of its window."""
    original = halo_exchange.count_halo_tokens

    def count_less(chunk: int, source: int, chunk_tokens: int, window: int) -> int:
        return original(chunk, source, chunk_tokens, window - 1)

    with patch.object(halo_exchange, "count_halo_tokens", count_less):
        yield


@register_bug
def halos_are_joined_in_the_order_of_ranks() -> Iterator[Any]:
    """A halo of several chunks has the chunk of the nearest rank first. Late chunks are in reverse order of ranks."""
    original = halo_exchange._join_halo

    def join_reversed(available: Any, chunk: int, chunk_tokens: int, window: int) -> Tensor:
        joined = original(available, chunk, chunk_tokens, window)
        halo, local = joined[:-chunk_tokens], joined[-chunk_tokens:]
        return torch.cat((*reversed(halo.split(chunk_tokens)), local)) if len(halo) else joined

    with patch.object(halo_exchange, "_join_halo", join_reversed):
        yield


@register_bug
def halos_come_from_the_wrong_neighbor() -> Iterator[Any]:
    """A rank with two neighbors takes the halo of its early chunk for that of its late chunk, and vice versa."""

    def swap_neighbors(x: Tensor, num_sent: list[int], num_received: list[int], group: Any) -> Tensor:
        received = all_to_all_rows(x, num_sent, num_received, group).split(num_received)
        neighbors = [rank for rank, num in enumerate(num_received) if num]
        sizes = {num_received[rank] for rank in neighbors}
        return torch.cat([received[rank] for rank in (reversed(neighbors) if len(sizes) == 1 else neighbors)])

    with patch.object(halo_exchange, "all_to_all_rows", swap_neighbors):
        yield


@register_bug
def halos_belong_to_the_document_of_the_chunk() -> Iterator[Any]:
    """The tokens of a halo count as tokens of the document in which the chunk starts."""
    original = AttentionMask.select_keys

    def extend_document(self: AttentionMask, keys: slice) -> AttentionMask:
        mask = original(self, keys)
        if mask.documents_BT is None or self.query_positions_BS is None:
            return mask
        num_halo_tokens = mask.documents_BT.shape[1] - self.query_positions_BS.shape[1] // 2
        first_BS = mask.documents_BT[:, num_halo_tokens:]
        halo_BT = first_BS[:, :1].expand(-1, num_halo_tokens)
        return replace(mask, documents_BT=torch.cat((halo_BT, first_BS), dim=1))

    with patch.object(AttentionMask, "select_keys", extend_document):
        yield


@register_bug
def gradients_of_halos_are_not_returned() -> Iterator[Any]:
    """A rank ignores the gradients that the queries of other ranks have for its keys and values."""

    def drop_gradients(x: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]) -> Tensor:
        return differentiable_collective(x, forward, lambda grad: torch.zeros_like(backward(grad)))

    with patch.object(halo_exchange, "differentiable_collective", drop_gradients):
        yield
