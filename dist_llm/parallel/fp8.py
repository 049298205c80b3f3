"""Matrix products of the blocks in float8: inputs and weights in e4m3, gradients in e5m2 (Micikevicius et al. 2022).

Each tensor has one scale, which is computed on the device at each use. The scale is the largest power of two that keeps
the largest element in the range of float8. With a power of two, the rounding of an element does not depend on the other
elements, unless the element is 2^14 times smaller than the largest element (2^29 times in e5m2). So results do not
depend on the split over microbatches and ranks, except for these tiny elements. GPUs multiply in float8. Other devices
emulate the products in bf16, which represents all float8 values exactly.

Shapes: M tokens, K inputs and N outputs of a layer.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.compat import scaled_mm
from dist_llm.config.check_fp8 import FP8_MULTIPLE
from dist_llm.errors import ConfigError
from dist_llm.models.decoder import Decoder

INPUT_DTYPE, GRAD_DTYPE = torch.float8_e4m3fn, torch.float8_e5m2
MIN_AMAX = 2.0**-100  # lower bound of the largest element, so that the scale is finite
EXPONENT_MASK = 0x7F800000  # the exponent bits of fp32


def use_float8_linears(model: Decoder) -> None:
    """Make every linear layer of the blocks multiply in float8. Parameter names and weights stay the same."""
    for block in model.blocks.values():
        for module in block.modules():
            if type(module) is nn.Linear:
                module.__class__ = Float8Linear


def check_float8_support(device: torch.device) -> None:
    """Raise ConfigError if `device` is a GPU without float8 matrix products."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability < (8, 9):
        capability_text = ".".join(map(str, capability)) if torch.version.cuda else "unknown, not an NVIDIA GPU"
        raise ConfigError(
            f"fp8: {torch.cuda.get_device_name(device)} (compute capability {capability_text}) has no float8 matrix "
            "products; they need an NVIDIA GPU of compute capability 8.9 or later (Ada, Hopper, Blackwell). "
            "Set fp8 to false"
        )


class Float8Linear(nn.Linear):
    """A linear layer that multiplies in float8. Inputs have any float type, outputs are bf16."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return float8_linear(x, self.weight, self.bias)


def float8_linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """[..., K] -> [..., N] in bf16, multiplied in float8."""
    x_MK = x.to(torch.bfloat16).flatten(0, -2)
    num_tokens = len(x_MK)
    if num_tokens % FP8_MULTIPLE:  # the config check ensures that K and N are multiples
        x_MK = F.pad(x_MK, (0, 0, 0, -num_tokens % FP8_MULTIPLE))
    y_MN: Tensor = _Float8MatMul.apply(x_MK, weight_NK)  # type: ignore[no-untyped-call]
    y = y_MN[:num_tokens].unflatten(0, x.shape[:-1])
    return y if bias_N is None else y + bias_N.to(y.dtype)


class _Float8MatMul(torch.autograd.Function):
    """y = x w^T. Saves the input in float8, and the weight without a quantized copy, which FSDP could not free."""

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
    """Return (`x` in float8, the inverse of its scale, []).

    The inverse scale is a power of two, or NaN if `x` has a non-finite element.
    """
    amax = x.abs().amax().float().clamp(min=MIN_AMAX)
    exact_scale = torch.finfo(dtype).max / amax
    scale = (exact_scale.view(torch.int32) & EXPONENT_MASK).view(torch.float32)  # rounded down to a power of two
    return (x.float() * scale).to(dtype), scale.reciprocal() + 0 * amax


def scaled_matmul(a_IK: Tensor, a_inv_scale: Tensor, b_JK: Tensor, b_inv_scale: Tensor) -> Tensor:
    """Return a b^T, [I, J] in bf16, accumulated in fp32.

    Both operands must be contiguous and float8, as the kernels on Ada and Hopper require.
    """
    if not a_IK.is_cuda:
        return emulate_scaled_matmul(a_IK, a_inv_scale, b_JK, b_inv_scale)
    return scaled_mm(a_IK, b_JK.t(), a_inv_scale, b_inv_scale, out_dtype=torch.bfloat16, use_fast_accum=False)


def emulate_scaled_matmul(a_IK: Tensor, a_inv_scale: Tensor, b_JK: Tensor, b_inv_scale: Tensor) -> Tensor:
    """Compute `scaled_matmul` without a float8 kernel.

    The scales are powers of two, so the final multiplication is exact.
    """
    return (a_IK.to(torch.bfloat16) @ b_JK.to(torch.bfloat16).t()) * (a_inv_scale * b_inv_scale)
