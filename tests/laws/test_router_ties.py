"""In the law tests with experts, no token has a near tie between experts, which rounding could decide otherwise.

A tie that layouts break differently would look like a bug of the layout.
"""

import math
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from dist_llm.models.moe import MoE
from tests.laws.law import GLOBAL_BATCH, make_layout_config, record_trace
from tests.laws.layouts import CLIPPED_SGD, Layout

MIN_GAP = 1e-9  # scores of two layouts differ by about 1e-15


def compute_smallest_gap(layer: MoE, scores_NE: Tensor) -> float:
    """Return the smallest difference between the last chosen and the first other expert, or group of experts."""
    if layer.selection_bias is not None:
        scores_NE = scores_NE + layer.selection_bias
    if layer.moe.n_groups == 1:
        return compute_gap_after(scores_NE, layer.moe.top_k)
    scores_NGe = scores_NE.unflatten(-1, (layer.moe.n_groups, -1))
    group_scores_NG = scores_NGe.sort(-1).values[..., -2:].sum(-1)
    groups = group_scores_NG.argsort(-1, descending=True)[:, : layer.moe.top_groups]
    allowed_NE = scores_NGe.gather(1, groups[..., None].expand(-1, -1, scores_NGe.shape[-1])).flatten(1)
    gaps = (
        compute_gap_after(group_scores_NG, layer.moe.top_groups),
        compute_gap_after(allowed_NE, layer.moe.top_k),
    )
    return min(gaps)


def compute_gap_after(scores_NE: Tensor, num_chosen: int) -> float:
    """Return the smallest difference between the scores number `num_chosen` and `num_chosen` + 1 of a token."""
    sorted_NE = scores_NE.sort(-1, descending=True).values
    return float((sorted_NE[:, num_chosen - 1] - sorted_NE[:, num_chosen]).min())


def measure_smallest_gap(model: str, **sections: object) -> float:
    """Return the smallest gap in three steps of one process."""
    config = make_layout_config(Layout(ranks=1, model=model, micro_batch=GLOBAL_BATCH), optim=CLIPPED_SGD, **sections)
    gaps = [math.inf]
    choose_experts = MoE.choose_experts

    def measure_and_choose(self: MoE, scores_NE: Tensor) -> Tensor:
        gaps.append(compute_smallest_gap(self, scores_NE))
        return choose_experts(self, scores_NE)

    with patch.object(MoE, "choose_experts", measure_and_choose):
        record_trace(config, steps=3)
    num_layers = 4 if model == "moe" else 2
    assert len(gaps) == 1 + 3 * num_layers
    return min(gaps)


@pytest.mark.parametrize("model", ["moe", "deepseek"])
def test_no_token_of_the_law_tests_has_a_near_tie(model: str) -> None:
    assert measure_smallest_gap(model) > MIN_GAP


def test_a_tie_is_measured() -> None:
    """Equal columns of the router give equal scores."""
    forward = MoE.forward

    def forward_with_tie(self: MoE, *args: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            self.router.weight[1:] = self.router.weight[:1]
        return forward(self, *args)

    with patch.object(MoE, "forward", forward_with_tie):
        assert measure_smallest_gap("moe") < MIN_GAP
