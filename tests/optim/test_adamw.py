"""The optimizers compute the updates of their papers. Weight decay applies to matrices and not to vectors."""

import numpy as np
import pytest
import torch
from torch import nn

from dist_llm.config.model_section import ModelConfig
from dist_llm.config.optim_sections import AdamWConfig, SGDConfig
from dist_llm.models.decoder import Decoder
from dist_llm.optim.build_optimizer import build_optimizer
from dist_llm.optim.param_groups import build_param_groups
from dist_llm.param_spec import collect_param_specs
from tests.optim.specs import MATRIX, VECTOR, make_spec

STEPS = 1000
IMPLEMENTATIONS = ("fused", "foreach")


def targets():
    """Return the minimizer of a quadratic loss, by parameter name."""
    rng = np.random.default_rng(0)
    return {"matrix": rng.normal(size=(3, 4)), "vector": rng.normal(size=4)}


def gradient(offset, t):
    """The gradient of a quadratic with noise.

    Where gradients vanish, Adam divides rounding errors by rounding errors.
    """
    return 0.5 * offset + np.sin(3 * t)


def run_reference(config, rate):
    """Compute algorithm 2 of Loshchilov and Hutter 2019 in fp64, with the decay multiplied by the learning rate."""
    values = {name: np.full_like(target, 0.5) for name, target in targets().items()}
    for name, target in targets().items():
        m, v = np.zeros_like(target), np.zeros_like(target)
        decay = config.weight_decay if target.ndim > 1 else 0.0
        for t in range(1, STEPS + 1):
            g = gradient(values[name] - target, t)
            m = config.beta1 * m + (1 - config.beta1) * g
            v = config.beta2 * v + (1 - config.beta2) * g**2
            m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
            step = m_hat / (np.sqrt(v_hat) + config.eps) + decay * values[name]
            values[name] = values[name] - rate(t) * step
    return values


def run_optimizer(config, rate, dtype):
    """Run the same steps with `build_optimizer`."""
    expected = {name: torch.tensor(target, dtype=dtype) for name, target in targets().items()}
    parameters = {name: nn.Parameter(torch.full_like(target, 0.5)) for name, target in expected.items()}
    optimizer = build_optimizer(config, parameters.items(), {name: make_spec(p) for name, p in parameters.items()})
    for t in range(1, STEPS + 1):
        for name, parameter in parameters.items():
            parameter.grad = gradient(parameter.detach() - expected[name], t)
        for group in optimizer.param_groups:
            group["lr"] = rate(t)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_adamw_equals_the_algorithm_of_the_paper(implementation):
    """The tolerance in fp32 is 5e-6: a thousand rounding errors of 6e-8 mostly cancel. In fp64 it is rounding only."""
    config = AdamWConfig(lr=1e-2, weight_decay=0.1, beta2=0.95, eps=1e-8, implementation=implementation)

    def rate(t):
        return 1e-2 * (1 - t / (2 * STEPS))

    expected = run_reference(config, rate)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        actual = run_optimizer(config, rate, dtype)
        for name in expected:
            np.testing.assert_allclose(actual[name].numpy(), expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_has_momentum_and_coupled_decay(momentum):
    config = SGDConfig(lr=0.1, momentum=momentum, weight_decay=0.01)
    parameter = nn.Parameter(torch.full((2, 2), 3.0, dtype=torch.float64))
    optimizer = build_optimizer(config, [("w", parameter)], {"w": MATRIX})
    expected, velocity = 3.0, 0.0
    for t in range(1, 20):
        parameter.grad = torch.full((2, 2), float(t), dtype=torch.float64)
        optimizer.step()
        velocity = momentum * velocity + t + 0.01 * expected
        expected -= 0.1 * velocity
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), expected, dtype=torch.float64))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_norms_and_biases_have_no_weight_decay(tie, decay_embeddings):
    shape = {"d_model": 8, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 4, "d_ff": 16}
    model = Decoder(
        ModelConfig(
            **shape, vocab_size=10, max_seq_len=4, bias=True, norm="layernorm", positions="learned", tie_embeddings=tie
        )
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = build_param_groups(
        AdamWConfig(decay_embeddings=decay_embeddings), model.named_parameters(), collect_param_specs(model)
    )
    decay_names, no_decay_names = ({names[id(parameter)] for parameter in group["params"]} for group in groups)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]

    block = {f"attention.{matrix_name}.weight" for matrix_name in ("q", "k", "v", "out")}
    block |= {f"feedforward.{matrix_name}.weight" for matrix_name in ("gate", "up", "down")}
    expected = {f"blocks.0.{name}" for name in block} | (set() if tie else {"head.out.weight"})
    if decay_embeddings:
        expected |= {"embed.tokens.weight", "embed.positions.weight"}
    assert decay_names == expected
    assert decay_names | no_decay_names == set(names.values())
    assert not decay_names & no_decay_names
    assert all(name.endswith(".bias") or "norm" in name or name.startswith("embed.") for name in no_decay_names)


def test_the_config_reaches_the_optimizer():
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    config = AdamWConfig(lr=0.3, beta1=0.8, beta2=0.7, eps=1e-3, weight_decay=0.2)
    optimizer = build_optimizer(config, [("w", matrix), ("b", vector)], {"w": MATRIX, "b": VECTOR})
    by_decay = {group["weight_decay"]: group for group in optimizer.param_groups}
    assert by_decay[0.2]["params"] == [matrix]
    assert by_decay[0.0]["params"] == [vector]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (0.3, (0.8, 0.7), 1e-3, True)


def test_model_without_matrices_has_one_group():
    assert len(build_optimizer(AdamWConfig(), [("b", nn.Parameter(torch.ones(2)))], {"b": VECTOR}).param_groups) == 1
