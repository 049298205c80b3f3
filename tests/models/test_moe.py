"""A layer with experts equals a second implementation in fp64, and each planted fault makes this comparison fail.

The second implementation is `ReferenceMoE`.
"""

from unittest.mock import patch

import pytest
import torch

from dist_llm.models.feedforward import DenseFeedForward
from dist_llm.models.kv_cache import KVCache
from dist_llm.models.moe import MoE
from dist_llm.models.router_stats import RouterStats
from tests.models.moe_faults import FAULTS
from tests.models.reference_moe import ReferenceMoE

B, S, D = 2, 5, 32
SMALL = {"name": "moe", "n_experts": 6, "top_k": 2, "d_expert": 8}
SIGMOID = {"score": "sigmoid", "selection_bias": True, "selection_bias_rate": 0.05}
GROUPS = {**SIGMOID, "n_experts": 8, "top_k": 3, "n_groups": 4, "top_groups": 2}
BALANCED = {"balance_loss": 0.3, "router_z_loss": 0.2}
# The keys of model.feedforward besides SMALL, and further keys of `model`.
LAYERS = {
    "softmax, normalized": (BALANCED, {}),
    "softmax, not normalized": ({**BALANCED, "normalize_weights": False, "weight_scale": 1.7}, {}),
    "softmax with selection bias": ({**BALANCED, "selection_bias": True, "router_bias": True}, {}),
    "sigmoid, normalized": ({**BALANCED, **SIGMOID, "weight_scale": 2.5}, {}),
    "sigmoid, not normalized": ({**BALANCED, "score": "sigmoid", "normalize_weights": False}, {}),
    "groups and shared experts": ({**BALANCED, **GROUPS, "n_shared_experts": 2}, {"feedforward_bias": True}),
    "load of the previous step": ({**BALANCED, **SIGMOID, "balance_over": "previous_step"}, {}),
    "one expert, no gate": ({**BALANCED, "top_k": 1, "normalize_weights": False}, {"activation": "relu_squared"}),
    "all experts, all biases": ({**BALANCED, "top_k": 6, "router_bias": True}, {"bias": True}),
}
LOSS_SCALE = torch.tensor(0.7, dtype=torch.float64)


def draw_normal(seed, *shape):
    """Return normal random numbers in fp64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomize_(layer):
    """Draw parameters large enough that each matters, and unequal buffers."""
    with torch.no_grad():
        for index, parameter in enumerate(layer.parameters()):
            parameter.copy_(0.4 * draw_normal(index, *parameter.shape))
        load_E = draw_normal(90, layer.moe.n_experts).exp()
        layer.previous_load.copy_(load_E / load_E.sum())
        if layer.selection_bias is not None:
            layer.selection_bias.copy_(0.2 * draw_normal(91, layer.moe.n_experts))
    return layer


@pytest.fixture
def make_layer(settings):
    """Return a function that makes the layer LAYERS[name] in fp64, with random parameters and buffers."""

    def make(name):
        moe_keys, model_keys = LAYERS[name]
        config = settings(feedforward={**SMALL, **moe_keys}, **model_keys)
        return randomize_(MoE(config, layer=0).double())

    return make


def make_reference(layer, name):
    """Return the second implementation of the layer LAYERS[name]."""
    return ReferenceMoE(layer, LAYERS[name][1].get("activation", "swiglu"))


def assert_close(actual, expected, name):
    """Compare relative to the largest element."""
    expected = torch.as_tensor(expected, dtype=torch.float64).detach()
    tolerance = 1e-11 * float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, msg=lambda text: f"{name}: {text}")


def assert_equals_the_reference(layer, name):
    """Compare outputs, statistics, all gradients and the updates of the buffers over two steps."""
    reference = make_reference(layer, name)
    for step in range(2):
        x_BSD, expected_x_BSD = (draw_normal(100 + step, B, S, D).requires_grad_() for _ in range(2))
        factor_BSD = draw_normal(200 + step, B, S, D)
        expected_BSD, expected_stats = reference.compute(expected_x_BSD)
        expected_loss = layer.moe.balance_loss * expected_stats.balance + layer.moe.router_z_loss * expected_stats.z
        ((expected_BSD * factor_BSD).sum() + LOSS_SCALE * expected_loss).backward()

        actual_BSD, packed = layer(x_BSD, LOSS_SCALE)
        (actual_BSD * factor_BSD).sum().backward()
        stats = RouterStats.unpack(packed)

        assert_close(actual_BSD, expected_BSD, "outputs")
        assert stats.counts_E.tolist() == expected_stats.counts_E, "not close: the numbers of tokens of the experts"
        for key in ("balance", "z", "entropy"):
            assert_close(getattr(stats, key), getattr(expected_stats, key).detach(), key)
        assert_close(x_BSD.grad, expected_x_BSD.grad, "gradient of the inputs")
        for key, parameter in layer.named_parameters():
            expected_grad = reference.values[key].grad
            assert expected_grad.abs().max() > 1e-4, f"{key} has no gradient, so the comparison proves nothing"
            assert_close(parameter.grad, expected_grad, f"gradient of {key}")
        layer.update_router_state_(stats.counts_E)
        reference.update_buffers(expected_stats.counts_E)
        assert_close(layer.previous_load, reference.previous_load_E, "previous load")
        if layer.selection_bias is not None:
            assert_close(layer.selection_bias, reference.bias_E, "selection bias")
        layer.zero_grad()
        for value in reference.values.values():
            value.grad = None


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_equals_the_reference(name, make_layer):
    assert_equals_the_reference(make_layer(name), name)


def test_evaluation_computes_the_same_outputs_without_statistics(make_layer):
    layer, x_BSD = make_layer("softmax, normalized"), draw_normal(1, B, S, D)
    outputs_BSD, packed = layer(x_BSD)
    assert packed is not None
    with patch.object(MoE, "_compute_stats", side_effect=AssertionError("evaluation computed statistics")):
        evaluated_BSD, evaluated_stats = layer.eval()(x_BSD)
    torch.testing.assert_close(evaluated_BSD, outputs_BSD, rtol=0, atol=0)
    assert evaluated_stats is None


def test_without_a_loss_scale_the_balance_losses_have_no_gradient(make_layer):
    """Evaluation passes no loss scale. The coefficients then change nothing."""
    layer, gradients = make_layer("softmax, normalized"), []
    for coefficient in (0.3, 30.0):
        layer.moe = layer.moe.model_copy(update={"balance_loss": coefficient})
        layer(draw_normal(1, B, S, D))[0].sum().backward()
        gradients.append(layer.router.weight.grad.clone())
        layer.zero_grad()
    assert torch.equal(*gradients)


def test_identical_experts_equal_the_dense_layer(settings):
    """With normalized weights, the value and the gradient of the inputs are those of one expert."""
    config = settings(feedforward={**SMALL, "d_expert": 48}, feedforward_bias=True)
    layer, dense = randomize_(MoE(config, layer=0).double()), DenseFeedForward(config, layer=0).double()
    with torch.no_grad():
        for key, parameter in dense.named_parameters():
            parameter.copy_(0.4 * draw_normal(5, *parameter.shape))
            layer.get_parameter(f"experts.{key}").copy_(parameter.expand(SMALL["n_experts"], *parameter.shape))
    inputs = [draw_normal(1, B, S, D).requires_grad_() for _ in range(2)]
    outputs = [layer(inputs[0])[0], dense(inputs[1])]
    for output_BSD in outputs:
        (output_BSD * draw_normal(2, B, S, D)).sum().backward()
    assert_close(outputs[0], outputs[1], "outputs")
    assert_close(inputs[0].grad, inputs[1].grad, "gradient of the inputs")
    layer.moe = layer.moe.model_copy(update={"normalize_weights": False})
    with pytest.raises(AssertionError, match="not close"):
        assert_close(layer(inputs[0])[0], outputs[1], "outputs")


@torch.no_grad()
def test_generation_equals_the_full_sequence(build):
    """A step with the KV cache routes one token; the choices do not depend on the other tokens."""
    groups = {**SMALL, **GROUPS, "n_shared_experts": 1}
    model = build(
        feedforward=groups, layers=["moe", "dense"], kinds={"moe": {}, "dense": {"feedforward": {"name": "dense"}}}
    )
    model = model.double()
    tokens_BS, cache = torch.arange(12)[None] * 7 % 20, KVCache()
    logits = torch.cat([model(tokens_BS[:, index : index + 1], cache=cache) for index in range(12)], dim=1)
    torch.testing.assert_close(logits, model(tokens_BS), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_detected(fault, make_layer):
    name, plant = FAULTS[fault]
    layer = make_layer(name)
    with plant(), pytest.raises(AssertionError, match="not close"):
        assert_equals_the_reference(layer, name)
