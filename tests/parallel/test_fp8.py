"""Float8 products have the error of float8 rounding, and a wrong scale is detected."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import ConfigError
from dist_llm.parallel import fp8
from dist_llm.parallel.fp8 import GRAD_DTYPE, INPUT_DTYPE, Float8Linear, check_float8_support, float8_linear, quantize
from dist_llm.parallel.parallelize import build_model_parts
from dist_llm.training.step import train_step
from tests.laws.law import make_batches, make_config

CPU = torch.device("cpu")
# Errors of round to nearest: relative for normal numbers, and absolute for subnormal ones in units of the scaled
# tensor.
ULP = {INPUT_DTYPE: (2.0**-4, 2.0**-10), GRAD_DTYPE: (2.0**-3, 2.0**-17)}
BF16_ULP = 2.0**-8  # of a result, which is rounded once


def make_factors(tokens: int = 48, inputs: int = 64, outputs: int = 96) -> tuple[Tensor, Tensor, Tensor]:
    """Make inputs, weight and the gradient of the outputs, of very different sizes, each exact in bf16."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = (((tokens, inputs), 1e-3), ((outputs, inputs), 2e-2), ((tokens, outputs), 1e-6))
    x, weight, grad_out = (
        (size * torch.randn(*shape, generator=generator)).bfloat16().float() for shape, size in shapes
    )
    return x, weight, grad_out


def compute_products(x: Tensor, weight: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute outputs and both gradients by the layer."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = float8_linear(x, weight)
    assert y.dtype == torch.bfloat16
    return y.detach().float(), *torch.autograd.grad(y, (x, weight), grad_out.bfloat16())


def list_factor_pairs(
    x: Tensor, weight: Tensor, grad_out: Tensor
) -> list[tuple[Tensor, torch.dtype, Tensor, torch.dtype]]:
    """The three products as pairs of factors a and b with their dtypes, for a b^T."""
    return [
        (x, INPUT_DTYPE, weight, INPUT_DTYPE),
        (grad_out, GRAD_DTYPE, weight.t(), INPUT_DTYPE),
        (grad_out.t(), GRAD_DTYPE, x.t(), INPUT_DTYPE),
    ]


def compute_error_bound(a: Tensor, a_dtype: torch.dtype, b: Tensor, b_dtype: torch.dtype) -> Tensor:
    """Bound the error of each element of a b^T, computed exactly except for rounding of a, b and the result.

    Rounding changes an element a by at most e_a = u |a| + s. Here u is half a unit in the last place, and s is the
    error of subnormal numbers; their spacing is below amax / (max / 2), since the scale is a power of two. A sum of
    products therefore errs by at most the sum of |a| e_b + e_a |b| + e_a e_b, plus the rounding of the result to bf16.
    """

    def compute_element_error(x: Tensor, dtype: torch.dtype) -> Tensor:
        u, smallest = ULP[dtype]
        return u * x.abs() + smallest * x.abs().max() / (torch.finfo(dtype).max / 2)

    a, b = a.double(), b.double()
    e_a, e_b = compute_element_error(a, a_dtype), compute_element_error(b, b_dtype)
    sums = a.abs() @ e_b.t() + e_a @ b.abs().t() + e_a @ e_b.t()
    return sums + BF16_ULP * ((a @ b.t()).abs() + sums)


def check_errors(x: Tensor, weight: Tensor, grad_out: Tensor) -> None:
    """Check that each element is within its bound and that the total error is about as large as rounding makes it.

    The relative rounding error of a random number is half a unit times 0.425 in root mean square, which is sqrt(1/3 * 3
    / (8 ln 2)): 2.65% in e4m3, 5.3% in e5m2. A product has the root of the sum of both squares.
    """
    for actual, (a, a_dtype, b, b_dtype) in zip(
        compute_products(x, weight, grad_out), list_factor_pairs(x, weight, grad_out), strict=True
    ):
        exact = a.double() @ b.double().t()
        assert ((actual - exact).abs() <= compute_error_bound(a, a_dtype, b, b_dtype)).all()
        expected_error = 0.425 * math.hypot(ULP[a_dtype][0], ULP[b_dtype][0])
        assert float((actual - exact).norm() / exact.norm()) == pytest.approx(expected_error, rel=0.2)


@pytest.mark.parametrize("tokens", [48, 1, 21])
def test_a_product_has_the_error_of_rounded_factors(tokens: int) -> None:
    """The number of tokens need not be a multiple of 16."""
    x, weight, grad_out = make_factors(tokens)
    for actual, (a, a_dtype, b, b_dtype) in zip(
        compute_products(x, weight, grad_out), list_factor_pairs(x, weight, grad_out), strict=True
    ):
        assert ((actual - a.double() @ b.double().t()).abs() <= compute_error_bound(a, a_dtype, b, b_dtype)).all()


def test_the_error_has_the_size_of_float8_rounding() -> None:
    check_errors(*make_factors(512, 128, 256))


def compute_torchao_products(x: Tensor, weight: Tensor, grad_out: Tensor, powers_of_two: bool) -> tuple[Tensor, ...]:
    """Compute the output and both gradients with the float8 layer of torchao, which is also emulated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of torch that torchao causes
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    layer.weight.data.copy_(weight)
    torchao_config = Float8LinearConfig(emulate=True, round_scales_to_power_of_2=powers_of_two)
    torchao_model = convert_to_float8_training(nn.Sequential(layer), config=torchao_config)
    x = x.bfloat16().requires_grad_()
    y = torchao_model(x)
    return y.detach(), *torch.autograd.grad(y, (x, torchao_model[0].weight), grad_out.bfloat16())


@pytest.mark.parametrize("sizes", [(48, 64, 96), (512, 256, 384)], ids=str)
def test_products_equal_those_of_torchao(sizes: tuple[int, int, int]) -> None:
    """With power-of-two scales, only the order of sums differs from torchao. Exact scales give other products."""
    x, weight, grad_out = make_factors(*sizes)
    actual = compute_products(x.bfloat16(), weight.bfloat16(), grad_out)
    for product, power_of_two_scaled, exactly_scaled in zip(
        actual,
        compute_torchao_products(x, weight, grad_out, powers_of_two=True),
        compute_torchao_products(x, weight, grad_out, powers_of_two=False),
        strict=True,
    ):
        size = power_of_two_scaled.double().norm()
        assert float((product.double() - power_of_two_scaled.double()).norm() / size) < 1e-7
        assert float((product.double() - exactly_scaled.double()).norm() / size) > 1e-3


def _double_unit(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Planted bug: products are twice as large."""
    rounded, unit = quantize(x, dtype)
    return rounded, 2 * unit


def _no_scale(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Planted bug: convert without a scale, so that small values become zero."""
    return x.float().to(dtype), torch.ones(())


def _too_large(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale 64 times too large, as for a tensor that has grown since; values out of range are clamped."""
    scale, dtype_max = 64 / quantize(x, dtype)[1], torch.finfo(dtype).max
    return (x.float() * scale).clamp(-dtype_max, dtype_max).to(dtype), scale.reciprocal()


def _too_small(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Planted bug: the scale is so small that most values are subnormal."""
    scale = 2.0**-14 / quantize(x, dtype)[1]
    return (x.float() * scale).to(dtype), scale.reciprocal()


def _coarse(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize everything to e5m2."""
    return quantize(x, GRAD_DTYPE)


def _exact(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round nothing."""
    return x, torch.ones(())


@pytest.mark.parametrize("wrong_quantize", [_double_unit, _no_scale, _too_large, _too_small, _coarse, _exact])
def test_a_wrong_scale_or_dtype_is_detected(
    wrong_quantize: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "quantize", wrong_quantize)
    with pytest.raises(AssertionError):
        check_errors(*make_factors(512, 128, 256))


@pytest.mark.parametrize("dtype", [INPUT_DTYPE, GRAD_DTYPE])
@pytest.mark.parametrize("size", [1e-20, 1.0, 447.0, 448.0, 449.0, 57344.0, 3e38])
def test_the_largest_element_fills_the_range(size: float, dtype: torch.dtype) -> None:
    x = torch.tensor([size, -size / 3, 0.0]).bfloat16()
    rounded, unit = quantize(x, dtype)
    dtype_max = torch.finfo(dtype).max
    assert dtype_max / 2 < float(x.float().abs().max() / unit) <= dtype_max
    assert math.frexp(float(unit))[0] == 0.5, "the unit must be a power of two"
    torch.testing.assert_close(rounded.float() * unit, x.float(), rtol=ULP[dtype][0], atol=0.0)


def test_zeros_remain_zeros_and_huge_values_remain_finite() -> None:
    x, weight, grad_out = make_factors()
    y, x_grad, w_grad = compute_products(torch.zeros_like(x), weight, torch.zeros_like(grad_out))
    assert not any(product.any() for product in (y, x_grad, w_grad))
    for size in (1e34, 1e-34):  # not the limits of bf16, so that products neither overflow nor vanish
        y, x_grad, w_grad = compute_products(size * torch.sign(x), weight, grad_out)
        assert float(y.double().norm() / size) == pytest.approx(float((torch.sign(x) @ weight.t()).norm()), rel=0.05)
        assert x_grad.isfinite().all()
    assert all(
        torch.isfinite(product).all() for product in compute_products(torch.full_like(x, 1e-44), weight, grad_out)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_values_reach_the_products(value: float) -> None:
    """The guard must see non-finite values."""
    for index in range(3):
        operands = [factor.clone() for factor in make_factors()]
        operands[index][3, 3] = value
        y, x_grad, w_grad = compute_products(*operands)
        assert y.isnan().all() == (index < 2)
        assert x_grad.isnan().all() == (index > 0)
        assert w_grad.isnan().all() == (index != 1)


def test_the_rounding_of_an_element_ignores_its_neighbors() -> None:
    """This holds for elements within a factor of 2^14 of the largest: normal e4m3 numbers reach from 2^-6 to 448."""
    x = make_factors(256)[0]
    x *= 2.0 ** torch.randint(-3, 4, (256, 1), generator=torch.Generator().manual_seed(0))
    largest = x.abs().max()
    x[x.abs() < largest * 2.0**-13] = largest * 2.0**-13
    rounded, unit = quantize(x, INPUT_DTYPE)
    quantized_rows = [quantize(rows, INPUT_DTYPE) for rows in x.split(4)]
    assert len({float(own_unit) for _, own_unit in quantized_rows}) > 2, (
        "the slices share their scales, so the test cannot detect a difference"
    )
    assert torch.equal(
        torch.cat([values.float() * own_unit for values, own_unit in quantized_rows]), rounded.float() * unit
    )


def _has_kernel() -> bool:
    """Return whether torch has an fp8 matrix product for this device."""
    one, x = torch.ones(()), torch.ones(16, 16)
    try:
        torch._scaled_mm(x.to(GRAD_DTYPE), x.to(INPUT_DTYPE).t(), one, one, out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize(("tokens", "padded_tokens"), [(512, 512), (21, 32)])
@pytest.mark.skipif(not _has_kernel(), reason="this torch has no _scaled_mm on a CPU")
def test_the_kernel_equals_the_emulation(tokens: int, padded_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's kernel call, on a CPU: operands have the layout and the sizes that it requires."""
    operands = make_factors(tokens, 128, 256)
    expected = compute_products(*operands)
    calls = []

    def kernel(a: Tensor, a_unit: Tensor, b: Tensor, b_unit: Tensor) -> Tensor:
        calls.append((a.is_contiguous(), b.is_contiguous(), *a.shape, *b.shape))
        return torch._scaled_mm(a, b.t(), a_unit, b_unit, out_dtype=torch.bfloat16, use_fast_accum=False)

    monkeypatch.setattr(fp8, "scaled_matmul", kernel)
    for actual, reference in zip(compute_products(*operands), expected, strict=True):
        torch.testing.assert_close(actual, reference, rtol=BF16_ULP, atol=1e-3 * float(reference.abs().max()))
    assert calls == [
        (True, True, padded_tokens, 128, 256, 128),
        (True, True, padded_tokens, 256, 128, 256),
        (True, True, 256, padded_tokens, 128, padded_tokens),
    ]


def test_only_linear_layers_of_blocks_use_float8() -> None:
    plain, changed = (
        build_model_parts(fp8_config(enable_fp8), mesh=None, device=CPU)[0] for enable_fp8 in (False, True)
    )
    assert [name for name, _ in changed.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(parameter.dtype == torch.float32 for parameter in changed.parameters())
    float8_names = {name for name, module in changed.named_modules() if isinstance(module, Float8Linear)}
    layers = ("attention.q", "attention.k", "attention.v", "attention.out")
    layers += ("feedforward.gate", "feedforward.up", "feedforward.down")
    assert float8_names == {f"blocks.{block}.{layer}" for block in range(4) for layer in layers}
    assert not any(isinstance(module, Float8Linear) for module in plain.modules())


def test_a_bias_is_added_in_bf16() -> None:
    layer = nn.Linear(64, 96)
    x = torch.randn(2, 5, 64)
    expected = float8_linear(x, layer.weight) + layer.bias.bfloat16()
    layer.__class__ = Float8Linear
    layer(x).sum().backward()
    assert torch.equal(layer(x), expected)
    assert layer.bias.grad is not None
    assert torch.equal(layer.bias.grad, torch.full((96,), 10.0))


def test_backward_saves_the_input_in_float8() -> None:
    x, weight, _ = make_factors()
    weight.requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        float8_linear(x.requires_grad_(), weight)
    assert [tensor.dtype for tensor in saved if tensor.ndim == 2] == [INPUT_DTYPE, torch.float32]
    assert any(tensor.data_ptr() == weight.data_ptr() for tensor in saved)


@pytest.mark.parametrize(
    ("capability", "cuda", "message"),
    [
        ((8, 0), "12.8", r"fp8: A GPU \(compute capability 8.0\) has no float8 matrix products.*Set fp8 to false"),
        ((9, 4), None, r"not an NVIDIA GPU"),
        ((8, 9), "12.8", ""),
        ((9, 0), "12.8", ""),
        ((10, 0), "12.8", ""),
    ],
)
def test_an_old_gpu_is_refused_before_the_model_is_built(
    capability: tuple[int, int], cuda: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    device = torch.device("cuda", 0)
    if not message:
        check_float8_support(device)
        return
    with pytest.raises(ConfigError, match=message):
        build_model_parts(fp8_config(enable_fp8=True), mesh=None, device=device)


STEPS = 60


def fp8_config(enable_fp8: bool) -> Config:
    """Return the config of a tiny run with or without fp8."""
    optim = {"name": "adamw", "lr": 3e-3, "clip": 1.0}
    return make_config(ranks=1, optim=optim, precision="bf16", fp8=enable_fp8)


def train_losses(enable_fp8: bool) -> list[float]:
    """Train a small model on four batches and return its losses."""
    config = fp8_config(enable_fp8)
    engine = NativeEngine(config, CPU)
    batches = [make_batches(config, engine, step) for step in range(4)]
    return [train_step(engine, batches[step % 4], config.optim.lr, step).loss.item() for step in range(STEPS)]


@pytest.fixture(scope="module")
def bf16_losses() -> list[float]:
    """The losses of the run without fp8."""
    return train_losses(enable_fp8=False)


def check_parity(actual: list[float], expected: list[float]) -> None:
    """Check that the mean over all steps agrees within 1% (the worst of five seeds: 0.27%, of single steps 3%)."""
    assert expected[-1] < 0.6 * expected[0], "the loss must fall"
    assert all(math.isfinite(loss) for loss in actual)
    assert sum(actual) == pytest.approx(sum(expected), rel=0.01)
    assert actual == pytest.approx(expected, rel=0.06)
    assert actual != expected


def test_a_float8_run_learns_like_a_bf16_run(bf16_losses: list[float]) -> None:
    check_parity(train_losses(enable_fp8=True), bf16_losses)


@pytest.mark.parametrize("wrong_quantize", [pytest.param(_double_unit, marks=pytest.mark.slow), _too_large])
def test_a_float8_run_with_a_wrong_scale_does_not_learn(
    wrong_quantize: Callable[..., object], bf16_losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8, "quantize", wrong_quantize)
    with pytest.raises(AssertionError):
        check_parity(train_losses(enable_fp8=True), bf16_losses)


def test_a_float8_layer_equals_a_linear_layer_of_rounded_factors() -> None:
    """Small whole numbers are exact in float8, so the two are equal."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-4, 5, shape, generator=generator).float() for shape in ((3, 7, 32), (48, 32)))
    assert torch.equal(float8_linear(x, weight).float(), F.linear(x, weight).bfloat16().float())
