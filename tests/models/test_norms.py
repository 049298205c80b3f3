"""RMSNorm on a CPU is torch's: values, gradients, types."""

import pytest
import torch
from torch import nn

from dist_llm.models.layers import RMSNorm


def both(dtype: torch.dtype, weight_dtype: torch.dtype, shape: tuple[int, ...]) -> list[list[torch.Tensor]]:
    found = []
    for kind in (RMSNorm, nn.RMSNorm):
        generator = torch.Generator().manual_seed(0)
        norm = kind(shape[-1], eps=1e-5).to(weight_dtype)
        with torch.no_grad():
            norm.weight.copy_(torch.rand(shape[-1], generator=generator) + 0.5)
        x = (3 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
        y = norm(x)
        y.backward(torch.randn(shape, generator=generator).to(y.dtype))
        found.append([y.detach(), x.grad, norm.weight.grad])
    return found


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's, of its own
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.float64, torch.float64, 1e-12),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, torch.bfloat16, 1e-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(16,), (5, 32), (2, 3, 4, 16)], ids=str)
def test_it_is_torchs(dtype: torch.dtype, weight_dtype: torch.dtype, tolerance: float, shape: tuple[int, ...]) -> None:
    """In bf16 to its rounding: 2^-8 of a value, for sums a little more."""
    for got, want in zip(*both(dtype, weight_dtype, shape), strict=True):
        assert got.dtype == want.dtype
        assert (got - want).abs().max() <= tolerance * want.abs().max()


def test_its_gradient_is_that_of_finite_differences() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(8, eps=1e-2).double()
    nn.init.normal_(norm.weight)
    assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight))


def test_a_row_of_zeros_stays_zero() -> None:
    norm, x = RMSNorm(8, eps=1e-5), torch.zeros(2, 8, requires_grad=True)
    y = norm(x)
    y.sum().backward()
    assert not y.any()
    assert x.grad is not None
    assert x.grad.isfinite().all()
