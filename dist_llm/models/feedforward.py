"""The position-wise feed-forward layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.schema import ModelConfig


class FeedForward(nn.Module):
    """down(gelu(up(x))), or down(silu(gate(x)) * up(x)) for swiglu (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        if config.activation == "swiglu":
            self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        if self.activation == "swiglu":
            return self.down(F.silu(self.gate(x_BSD)) * self.up(x_BSD))
        return self.down(F.gelu(self.up(x_BSD), approximate="tanh" if self.activation == "gelu_tanh" else "none"))
