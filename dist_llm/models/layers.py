"""What a block has beside attention: the normalisation layers, by name, and the position-wise feed-forward layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dist_llm.config.check import gated
from dist_llm.config.schema import ModelConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def build_norm(config: ModelConfig) -> nn.Module:
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over d_model."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    return RMSNorm(config.d_model, eps=config.norm_eps)


class RMSNorm(nn.RMSNorm):
    """torch's, which on a CPU is made of many passes, forward and back; here it has few."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if x.device.type != "cpu" or type(x) is not Tensor or torch.compiler.is_compiling():
            return super().forward(x)
        normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normed


class _RMSNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x^2) + eps), in fp32 or better."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        return (wide * scale).mul_(weight_D).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, scale = ctx.saved_tensors
        normed, y_grad = _wide(x) * scale, _wide(y_grad)
        weight_grad_D = (y_grad * normed).reshape(-1, x.shape[-1]).sum(0)
        x_grad = y_grad * weight_D
        along = torch.linalg.vecdot(x_grad, normed)[..., None]
        x_grad = x_grad.addcmul_(normed, along, value=-1 / x.shape[-1]).mul_(scale)
        return x_grad.to(x.dtype), weight_grad_D.to(weight_D.dtype), None


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class FeedForward(nn.Module):
    """down(f(up(x))), or down(f(gate(x)) * up(x)) for the gated ones (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.bias) if gated(config) else None
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        if self.gate is None:
            return self.down(self.activation(self.up(x_BSD)))
        return self.down(self.activation(self.gate(x_BSD)) * self.up(x_BSD))
