"""Grouped linear layers equal a loop over the experts, and a compiled layer with experts equals the eager one."""

from unittest.mock import patch

import pytest
import torch

from dist_llm.models.grouped_linear import GroupedLinear, grouped_linear
from dist_llm.models.moe import MoE
from dist_llm.models.router_stats import RouterStats
from dist_llm.models.token_dispatcher import LocalTokenDispatcher
from tests.laws.worlds import WorldError, get_world

COUNTS = {"uneven": (3, 1, 7, 5), "empty": (0, 9, 0, 4), "one expert has all": (0, 0, 16, 0), "no row": (0, 0, 0, 0)}
INPUTS, OUTPUTS = 16, 24
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def draw_normal(seed, *shape, dtype):
    """Return normal random numbers with gradients."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return values.to(dtype).requires_grad_()


def compute_ends(counts):
    """Return the end of the rows of each expert."""
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def multiply_in_loop(x_RI, weight_EOI, counts):
    """Return the products of the rows of each expert in fp64."""
    rows = x_RI.double().split(list(counts))
    return torch.cat([x_rI @ weight_OI.T for x_rI, weight_OI in zip(rows, weight_EOI.double(), strict=True)])


def assert_relatively_close(actual, expected, tolerance):
    """Compare relative to the largest element."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_products_equal_a_loop(counts, dtype):
    """Rounded inputs are exact in fp64, so only the products and the sums are rounded."""
    x_RI, weight_EOI = draw_normal(1, sum(counts), INPUTS, dtype=dtype), draw_normal(2, 4, OUTPUTS, INPUTS, dtype=dtype)
    grad_RO = draw_normal(3, sum(counts), OUTPUTS, dtype=dtype).detach()
    actual_RO = grouped_linear(x_RI, weight_EOI, compute_ends(counts))
    actual = (actual_RO, *torch.autograd.grad(actual_RO, (x_RI, weight_EOI), grad_RO))
    expected_RO = multiply_in_loop(x_RI, weight_EOI, counts)
    expected = (expected_RO, *torch.autograd.grad(expected_RO, (x_RI, weight_EOI), grad_RO.double()))
    assert all(value.dtype == dtype for value in actual)
    for value, expected_value in zip(actual, expected, strict=True):
        assert_relatively_close(value.detach(), expected_value.detach(), TOLERANCES[dtype])
    grad_EOI = actual[2]
    assert all((grad_EOI[expert] == 0).all() for expert, count in enumerate(counts) if not count)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_each_row_gets_the_bias_of_its_expert(dtype):
    counts = COUNTS["empty"]
    layer = GroupedLinear(4, INPUTS, OUTPUTS, bias=True).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(draw_normal(1, 4, OUTPUTS, INPUTS, dtype=dtype))
        layer.bias.copy_(draw_normal(2, 4, OUTPUTS, dtype=dtype))
    x_RI = draw_normal(3, sum(counts), INPUTS, dtype=dtype)
    y_RO = layer(x_RI, compute_ends(counts))
    grad_RO = torch.randint(-3, 4, y_RO.shape, generator=torch.Generator().manual_seed(4))  # their sums are exact
    (y_RO * grad_RO).sum().backward()
    experts_R = torch.arange(4).repeat_interleave(torch.tensor(counts))
    expected_RO = multiply_in_loop(x_RI, layer.weight, counts) + layer.bias.double()[experts_R]
    assert_relatively_close(y_RO.detach(), expected_RO.detach(), TOLERANCES[dtype])
    expected_grads = torch.stack([grad_rO.sum(0) for grad_rO in grad_RO.split(list(counts))])
    assert torch.equal(layer.bias.grad.long(), expected_grads)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_gradients_in_fp64_equal_finite_differences(counts):
    x_RI = draw_normal(1, sum(counts), 8, dtype=torch.float64)
    weight_EOI = draw_normal(2, 4, 8, 8, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, weight: grouped_linear(x, weight, compute_ends(counts)), (x_RI, weight_EOI)
    )


@pytest.fixture
def layer(settings):
    """Return a layer with experts in fp32 whose balance loss needs counts per sequence."""
    section = {"name": "moe", "n_experts": 8, "top_k": 3, "d_expert": 8, "balance_loss": 1.0, "router_z_loss": 0.1}
    layer = MoE(settings(feedforward=section, feedforward_bias=True), layer=0)
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.3 * draw_normal(index, *parameter.shape, dtype=torch.float32))
    return layer


def assert_compiled_equals_eager(layer):
    """Compare outputs, statistics and gradients."""
    results = []
    for apply in (layer, torch.compile(layer)):
        x_BSD = draw_normal(9, 4, 16, 32, dtype=torch.float32)
        output_BSD, packed = apply(x_BSD, torch.tensor(0.5))
        output_BSD.square().sum().backward()
        gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
        results.append({"outputs": output_BSD.detach(), "gradient of the inputs": x_BSD.grad, **gradients})
        results[-1] |= dict(vars(RouterStats.unpack(packed)))
        layer.zero_grad()
    eager, compiled = results
    assert torch.equal(compiled.pop("counts_E"), eager.pop("counts_E")), "not close: the counts of the experts"
    for name, value in eager.items():
        assert value.abs().max() > 0, f"{name} is zero, so the comparison proves nothing"
        assert_relatively_close(compiled[name], value, 2e-5)


def test_a_compiled_layer_equals_the_eager_layer(layer):
    get_world(1).run(assert_compiled_equals_eager, layer)


def lose_counts_and_compare(layer):
    """Plant a bug: a compiled kernel loses a choice, which changes the load of an expert. Then compare."""
    all_reduce_counts = LocalTokenDispatcher.all_reduce_counts

    def lose_a_count(self, counts_BE):
        lost_BE = torch.zeros_like(counts_BE)
        lost_BE[0, 0] = 1.0 if torch.compiler.is_compiling() else 0.0
        return all_reduce_counts(self, counts_BE) - lost_BE

    with patch.object(LocalTokenDispatcher, "all_reduce_counts", lose_a_count):
        assert_compiled_equals_eager(layer)


def test_lost_counts_of_a_compiled_layer_are_detected(layer):
    with pytest.raises(WorldError, match="not close"):
        get_world(1).run(lose_counts_and_compare, layer)
