"""Debug mode names the first module whose output is not finite."""

import pytest
import torch
from torch import Tensor

from dist_llm.models.build_model import build_model
from dist_llm.training.debug import DebugError, check_finite
from tests.laws.law import make_config


def test_the_block_whose_residual_stream_is_not_finite_is_named() -> None:
    """A block returns a tuple: the residual stream, and the statistics of its router."""
    model = build_model(make_config(ranks=1).model)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    tokens_BS = torch.arange(8)[None]
    with check_finite(model):
        model(tokens_BS)

    def overflow(x_BSD: Tensor, context: object) -> tuple[Tensor, None]:
        return x_BSD * torch.inf, None

    model.blocks["1"].forward = overflow  # type: ignore[assignment]
    with check_finite(model), pytest.raises(DebugError, match=r"output of module blocks\.1 \(Block\)"):
        model(tokens_BS)
