"""The normalization layers of the residual stream, and of queries and keys."""

import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.model_section import ModelConfig


class RMSNorm(nn.RMSNorm):
    """Root mean square normalization (Zhang and Sennrich 2019). With `plus_one` it multiplies by 1 + weight (Gemma)."""

    def __init__(self, size: int, eps: float, weight: str = "plain") -> None:
        super().__init__(size, eps=eps, elementwise_affine=weight != "none")
        self.plus_one = weight == "plus_one"

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return F.rms_norm(x, self.normalized_shape, self.effective_weight(), self.eps)

    def effective_weight(self) -> Tensor | None:
        """Return the tensor that multiplies the normalized elements; None: no factor."""
        return self.weight + 1 if self.plus_one else self.weight


class LayerNorm(nn.LayerNorm):
    """Layer normalization (Ba et al. 2016). With `plus_one` it multiplies by 1 + weight (Nemotron)."""

    def __init__(self, size: int, eps: float, bias: bool, weight: str = "plain") -> None:
        super().__init__(size, eps=eps, bias=bias, elementwise_affine=weight != "none")
        self.plus_one = weight == "plus_one"

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension."""
        return F.layer_norm(x, self.normalized_shape, self.effective_weight(), self.effective_bias(), self.eps)

    def effective_weight(self) -> Tensor | None:
        """Return the tensor that multiplies the normalized elements; None: no factor."""
        return self.weight + 1 if self.plus_one else self.weight

    def effective_bias(self) -> Tensor | None:
        """Return the tensor that is added; None: nothing is added. Tensor parallelism overrides it (local part)."""
        return self.bias


def build_norm(config: ModelConfig) -> nn.Module:
    """Build the normalization layer of the residual stream, over d_model."""
    if config.norm == "layernorm":
        bias = config.bias or config.norm_bias
        return LayerNorm(config.d_model, config.norm_eps, bias, config.norm_weight)
    return RMSNorm(config.d_model, config.norm_eps, config.norm_weight)
