"""The blocks' matrix products in float8: inputs and weights in e4m3, gradients in e5m2 (Micikevicius et al. 2022).

A tensor is rounded as a whole, at each use: multiplied by the largest power of two that keeps its largest element in
float8's range, which is found on the device. What an element is rounded to then does not hang on its neighbours, unless
it is 2^14 times smaller than the largest (in e5m2: 2^29 times). So how rows and columns are split over microbatches and
ranks makes no difference but there. A GPU multiplies float8; elsewhere it is emulated by products of the same rounded
numbers in bf16, which holds them exactly.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.check_fp8 import MULTIPLE
from dist_llm.errors import ConfigError
from dist_llm.models.decoder import Decoder

# M tokens  K inputs  N outputs of a layer

INPUT_DTYPE, GRAD_DTYPE = torch.float8_e4m3fn, torch.float8_e5m2
MIN_AMAX = 2.0**-100  # a largest element below it counts as this, so that the scale is finite
EXPONENT_MASK = 0x7F800000  # the bits of fp32 that make it a power of two


def use_float8_linears(model: Decoder) -> None:
    """Every linear layer of the blocks multiplies in float8; names and weights stay."""
    for block in model.blocks.values():
        for module in block.modules():
            if type(module) is nn.Linear:
                module.__class__ = Float8Linear


def check_float8_support(device: torch.device) -> None:
    """Raises ConfigError unless this GPU multiplies the two kinds of float8 above."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability < (8, 9):
        capability_text = ".".join(map(str, capability)) if torch.version.cuda else "of another maker"
        raise ConfigError(
            f"fp8: {torch.cuda.get_device_name(device)} (compute capability {capability_text}) has no products in "
            "float8; they take NVIDIA's GPUs of 8.9 or later (Ada, Hopper, Blackwell). Set fp8 to false"
        )


class Float8Linear(nn.Linear):
    """Inputs of any float type, outputs in bf16."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return float8_linear(x, self.weight, self.bias)


def float8_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """[..., K] -> [..., N] in bf16, by products in float8."""
    x_MK = x.to(torch.bfloat16).flatten(0, -2)
    tokens = len(x_MK)
    if tokens % MULTIPLE:  # K and N were checked with the config
        x_MK = F.pad(x_MK, (0, 0, 0, -tokens % MULTIPLE))
    y_MN: Tensor = _Float8MatMul.apply(x_MK, weight_NK)  # type: ignore[no-untyped-call]
    y = y_MN[:tokens].unflatten(0, x.shape[:-1])
    return y if bias_N is None else y + bias_N.to(y.dtype)


class _Float8MatMul(torch.autograd.Function):
    """y = x w^T. Keeps the input in float8, and of the weight nothing that FSDP could not free."""

    @staticmethod
    def forward(ctx: Any, x_MK: Tensor, weight_NK: Tensor) -> Tensor:
        x_MK, x_inv_scale = quantize(x_MK, INPUT_DTYPE)
        ctx.save_for_backward(x_MK, x_inv_scale, weight_NK)
        return scaled_matmul(x_MK, x_inv_scale, *quantize(weight_NK.to(torch.bfloat16), INPUT_DTYPE))

    @staticmethod
    def backward(ctx: Any, y_grad_MN: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_MK, x_inv_scale, weight_NK = ctx.saved_tensors
        y_grad_MN, inv_scale = quantize(y_grad_MN, GRAD_DTYPE)
        x_grad_MK = weight_grad_NK = None
        if ctx.needs_input_grad[0]:
            w_NK, w_inv_scale = quantize(weight_NK.to(torch.bfloat16), INPUT_DTYPE)
            x_grad_MK = scaled_matmul(y_grad_MN, inv_scale, w_NK.t().contiguous(), w_inv_scale)
        if ctx.needs_input_grad[1]:
            weight_grad_NK = scaled_matmul(y_grad_MN.t().contiguous(), inv_scale, x_MK.t().contiguous(), x_inv_scale)
            weight_grad_NK = weight_grad_NK.to(weight_NK.dtype)
        return x_grad_MK, weight_grad_NK


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` in float8, and the unit [] that it is in: a power of two, or NaN where anything in `x` is not finite."""
    amax = x.abs().amax().float().clamp(min=MIN_AMAX)
    exact = torch.finfo(dtype).max / amax
    scale = (exact.view(torch.int32) & EXPONENT_MASK).view(torch.float32)  # rounded down to a power of two
    return (x.float() * scale).to(dtype), scale.reciprocal() + 0 * amax


def scaled_matmul(a_IK: Tensor, a_inv_scale: Tensor, b_JK: Tensor, b_inv_scale: Tensor) -> Tensor:
    """a b^T, [I, J] in bf16, summed in fp32; both are contiguous float8, as the kernel wants them on Ada and Hopper."""
    if not a_IK.is_cuda:
        return emulate_scaled_matmul(a_IK, a_inv_scale, b_JK, b_inv_scale)
    return torch._scaled_mm(a_IK, b_JK.t(), a_inv_scale, b_inv_scale, out_dtype=torch.bfloat16, use_fast_accum=False)


def emulate_scaled_matmul(a_IK: Tensor, a_inv_scale: Tensor, b_JK: Tensor, b_inv_scale: Tensor) -> Tensor:
    """`product` without its kernel: units are powers of two, so multiplying with them last rounds nothing."""
    return (a_IK.to(torch.bfloat16) @ b_JK.to(torch.bfloat16).t()) * (a_inv_scale * b_inv_scale)
