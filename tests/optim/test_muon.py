"""The update of Muon is orthogonal, has the size of an AdamW update, and applies only to matrices of blocks."""

import pytest
import torch
from torch import nn

from dist_llm.config.optim_sections import AdamWConfig, MuonConfig, OptimConfig
from dist_llm.optim.build_optimizer import build_optimizer, select_muon_params
from dist_llm.optim.muon import newton_schulz, orthogonalize
from dist_llm.param_spec import ZEROS, ParamSpec
from tests.optim.specs import MATRIX, VECTOR


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16), (1, 8)])
def test_newton_schulz_moves_singular_values_near_one(shape: tuple[int, int]) -> None:
    """The SVD has the same singular vectors. Singular values from 0.01 to 1 become values from 0.67 to 1.21."""
    generator = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -2, min(shape), dtype=torch.float64)
    matrix = (u * values) @ vt
    (actual,) = newton_schulz(1e3 * matrix[None].float()).double()
    in_singular_basis = u.T @ actual @ vt.T
    diagonal = in_singular_basis.diagonal()
    assert ((diagonal > 0.67) & (diagonal < 1.21)).all(), diagonal
    assert (in_singular_basis - diagonal.diag()).abs().max() < 1e-3


def test_matrices_of_one_shape_are_batched_in_order() -> None:
    matrices = [torch.randn(4, 8), torch.randn(8, 4), torch.randn(4, 8)]
    for actual, matrix in zip(orthogonalize(matrices), matrices, strict=True):
        torch.testing.assert_close(actual, newton_schulz(matrix[None])[0])


def test_newton_schulz_ignores_the_scale() -> None:
    assert not newton_schulz(torch.zeros(1, 4, 4)).any()
    matrix = torch.randn(1, 4, 4)
    torch.testing.assert_close(newton_schulz(1e-12 * matrix), newton_schulz(matrix), rtol=1e-4, atol=1e-5)


SPECS = {
    "embed.tokens.weight": ParamSpec(("vocab", "embed"), ZEROS, is_embedding=True),
    "blocks.0.attention.q.weight": MATRIX,
    "blocks.0.feedforward.up.weight": MATRIX,
    "blocks.0.norm_attention.weight": VECTOR,
    "blocks.0.attention.q.bias": VECTOR,
    "head.out.weight": ParamSpec(("vocab", "embed"), ZEROS),
}


def make_parameters() -> dict[str, nn.Parameter]:
    """Return random parameters with names of a decoder: matrices, vectors, embedding and head."""
    generator = torch.Generator().manual_seed(1)
    shapes = {
        "embed.tokens.weight": (8, 4),
        "blocks.0.attention.q.weight": (4, 4),
        "blocks.0.feedforward.up.weight": (12, 4),
        "blocks.0.norm_attention.weight": (4,),
        "blocks.0.attention.q.bias": (4,),
        "head.out.weight": (8, 4),
    }
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def run_steps(config: OptimConfig, count: int = 3) -> dict[str, torch.Tensor]:
    """Take `count` steps with random gradients; return the parameters by name."""
    parameters_by_name = make_parameters()
    optimizer = build_optimizer(config, parameters_by_name.items(), SPECS)
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters_by_name.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in parameters_by_name.items()}


def test_muon_applies_to_matrices_of_blocks_only() -> None:
    muon = run_steps(MuonConfig(lr=0.01, weight_decay=0.1))
    adamw = run_steps(AdamWConfig(lr=0.01, weight_decay=0.1))
    different_names = [name for name in muon if not torch.equal(muon[name], adamw[name])]
    assert (
        different_names
        == list(select_muon_params(MuonConfig(), make_parameters().items(), SPECS))
        == [
            "blocks.0.attention.q.weight",
            "blocks.0.feedforward.up.weight",
        ]
    )


def test_muon_steps_equal_the_definition() -> None:
    """The definition in fp64: Nesterov momentum, decay times the learning rate, scale 0.2 sqrt(larger side)."""
    rate, decay, beta, name = 0.01, 0.1, 0.9, "blocks.0.feedforward.up.weight"
    actual = run_steps(MuonConfig(lr=rate, weight_decay=decay, muon_momentum=beta))[name]
    weight, momentum = make_parameters()[name].detach().double(), torch.zeros(12, 4, dtype=torch.float64)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        gradients_by_name = {n: torch.randn(p.shape, generator=generator) for n, p in make_parameters().items()}
        gradient = gradients_by_name[name].double()
        momentum = beta * momentum + (1 - beta) * gradient
        update = newton_schulz((beta * momentum + (1 - beta) * gradient)[None])[0]
        weight = weight * (1 - rate * decay) - rate * 0.2 * 12**0.5 * update
    torch.testing.assert_close(actual.double(), weight, rtol=1e-5, atol=1e-6)


def test_muon_update_has_the_size_of_an_adamw_update() -> None:
    """With a large random gradient, the first AdamW update has an RMS of 1, and the Muon update 0.2 (Liu et al.)."""
    parameter = nn.Parameter(torch.zeros(64, 96))
    optimizer = build_optimizer(MuonConfig(lr=1.0, weight_decay=0.0), [("w", parameter)], specs={"w": MATRIX})
    parameter.grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert parameter.detach().square().mean().sqrt() == pytest.approx(0.2, rel=0.15)


def test_missing_gradient_counts_as_zero() -> None:
    parameter = nn.Parameter(torch.zeros(4, 4))
    optimizer = build_optimizer(MuonConfig(lr=1.0, weight_decay=0.0), [("w", parameter)], specs={"w": MATRIX})
    parameter.grad = torch.eye(4)
    optimizer.step()
    before = parameter.detach().clone()
    assert parameter.grad is None
    optimizer.step()
    assert (parameter - before).diagonal().abs().min() > 0.1
