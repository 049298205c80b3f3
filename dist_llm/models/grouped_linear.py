"""Linear layers of many experts, applied to rows that are sorted by expert.

Shape suffixes: R rows, E experts, I inputs, O outputs. `ends_E` has the end of the rows of each expert, int32: the rows
of expert e are ends_E[e - 1] : ends_E[e], and all rows belong to an expert.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.feedforward_sections import GROUPED_WIDTH_MULTIPLE
from dist_llm.sharded import to_local


class GroupedLinear(nn.Module):
    """One linear layer per expert: [R, I] -> [R, O]. The weights of all experts are one tensor [E, O, I].

    Under expert parallelism the parameters are DTensors, and a rank applies the experts that it holds.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None

    def forward(self, x_RI: Tensor, ends_E: Tensor) -> Tensor:
        """[R, I] -> [R, O], in the autocast dtype if autocast is on."""
        weight_EOI, device_type = to_local(self.weight), x_RI.device.type
        dtype = weight_EOI.dtype
        if torch.is_autocast_enabled(device_type):  # autocast does not know grouped products
            dtype = torch.get_autocast_dtype(device_type)
        y_RO = grouped_linear(x_RI.to(dtype), weight_EOI.to(dtype), ends_E)
        if self.bias is None:
            return y_RO
        # The bias is the weight of an input that is 1. So its gradient needs no scatter-add over rows. The other inputs
        # pad the product to the size that it needs.
        ones_RI = y_RO.new_ones(len(y_RO), GROUPED_WIDTH_MULTIPLE)
        bias_EOI = F.pad(to_local(self.bias).to(dtype)[..., None], (0, GROUPED_WIDTH_MULTIPLE - 1))
        return y_RO + grouped_linear(ones_RI, bias_EOI, ends_E)


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply the rows of each expert by the transposed matrix of the expert: [R, I] -> [R, O]."""
    # The compiler can trace torch's grouped product in bf16 only.
    if x_RI.dtype == torch.float64 or (torch.compiler.is_compiling() and x_RI.dtype != torch.bfloat16):
        output_RO: Tensor = torch.ops.dist_llm.grouped_linear(x_RI, weight_EOI, ends_E)
        return output_RO
    return F.grouped_mm(x_RI.contiguous(), weight_EOI.mT, offs=ends_E)


@torch.library.custom_op("dist_llm::grouped_linear", mutates_args=())
def _grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    return _multiply_groups(x_RI, weight_EOI.mT, ends_E)


@torch.library.custom_op("dist_llm::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad_RO: Tensor, x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x_RI = _multiply_groups(grad_RO, weight_EOI, ends_E)
    if x_RI.dtype != torch.float64:
        return grad_x_RI, F.grouped_mm(grad_RO.mT, x_RI, offs=ends_E)
    groups = zip(_split_groups(grad_RO, ends_E), _split_groups(x_RI, ends_E), strict=True)
    return grad_x_RI, torch.stack([grad_rO.mT @ x_rI for grad_rO, x_rI in groups])


def _multiply_groups(x_RI: Tensor, weight_EIO: Tensor, ends_E: Tensor) -> Tensor:
    if x_RI.dtype != torch.float64:
        return F.grouped_mm(x_RI.contiguous(), weight_EIO, offs=ends_E)
    # F.grouped_mm does not support fp64.
    return torch.cat(
        [x_rI @ weight_IO for x_rI, weight_IO in zip(_split_groups(x_RI, ends_E), weight_EIO, strict=True)]
    )


def _split_groups(x_RI: Tensor, ends_E: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of each expert."""
    return x_RI.tensor_split(ends_E.tolist()[:-1])


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
    grad_x_RI, grad_weight_EOI = torch.ops.dist_llm.grouped_linear_backward(grad_RO.contiguous(), *ctx.saved_tensors)
    return grad_x_RI, grad_weight_EOI, None


_grouped_linear.register_fake(lambda x_RI, weight_EOI, ends_E: x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1]))
_grouped_linear_backward.register_fake(
    lambda grad_RO, x_RI, weight_EOI, ends_E: (torch.empty_like(x_RI), torch.empty_like(weight_EOI))
)
_grouped_linear.register_autograd(_backward, setup_context=_save_inputs)
