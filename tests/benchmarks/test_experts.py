"""benchmarks/experts.py counts the bytes that the formula of docs/experts.md predicts."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from benchmarks.expert_traffic import count_traffic
from dist_llm.models.moe import MoE
from tests.laws.worlds import get_world

SIZES = ["model.d_model=32", "model.n_layers=2", "model.vocab_size=64", "data.seq_len=16", "data.global_batch=8"]
NUM_LAYERS, NUM_EXPERTS, TOP_K, WIDTH, NUM_TOKENS = 2, 8, 2, 32, 16 * 8


def choose_in_turn(self: MoE, scores_NE: Tensor) -> Tensor:
    """Token i chooses experts 2 i and 2 i + 1, modulo the number of experts. So all experts have the same load."""
    num_tokens, num_experts = scores_NE.shape
    return (torch.arange(num_tokens * self.moe.top_k) % num_experts).view(num_tokens, self.moe.top_k)


def choose_first(self: MoE, scores_NE: Tensor) -> Tensor:
    """All tokens choose the first experts, which are on rank 0."""
    return torch.arange(self.moe.top_k).expand(len(scores_NE), -1)


def count_with_choice(choose: Callable[..., Tensor], ranks: int, overrides: list[str]) -> dict[str, int]:
    with patch.object(MoE, "choose_experts", choose):
        return count_traffic(ranks, [*SIZES, *overrides])


def count_on_ranks(choose: Callable[..., Tensor], ranks: int, *overrides: str) -> list[dict[str, Any]]:
    return get_world(ranks).run(count_with_choice, choose, ranks, list(overrides))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_balanced_load_sends_the_bytes_of_the_formula(ranks: int, micro_batch: int) -> None:
    num_microbatches = 8 // ranks // micro_batch
    rows = NUM_TOKENS // ranks * TOP_K * (ranks - 1) // ranks  # that a rank sends to other ranks
    for count in count_on_ranks(choose_in_turn, ranks, f"data.micro_batch={micro_batch}"):
        # Dispatch and combine, in forward and in backward; fp32.
        assert count["row_bytes"] == NUM_LAYERS * 4 * rows * WIDTH * 4
        assert count["count_bytes"] == NUM_LAYERS * num_microbatches * 8 * NUM_EXPERTS * (ranks - 1) // ranks
        assert count["row_bytes"] == count["balanced_row_bytes"]
        assert count["count_bytes"] == count["balanced_count_bytes"]
        assert count["calls"] == NUM_LAYERS * num_microbatches * 5


def test_the_rank_of_popular_experts_sends_more() -> None:
    """All tokens choose experts of rank 0, which returns all outputs and their gradients to the three other ranks."""
    rows = NUM_TOKENS // 4 * TOP_K
    counts = count_on_ranks(choose_first, 4)
    assert [count["row_bytes"] for count in counts] == [
        NUM_LAYERS * num_rows * rows * WIDTH * 4 for num_rows in (6, 2, 2, 2)
    ]
    assert {count["balanced_row_bytes"] for count in counts} == {NUM_LAYERS * 3 * rows * WIDTH * 4}


def test_recomputation_repeats_the_exchanges_of_forward() -> None:
    """Backward needs the outputs of the experts for the gradients of their weights, so combine is repeated, too."""
    (count, _) = count_on_ranks(choose_in_turn, 2, "parallel.recompute=full")
    assert count["row_bytes"] == count["balanced_row_bytes"] * 3 // 2
    assert count["count_bytes"] == 2 * count["balanced_count_bytes"]
