"""Muon's update is orthogonal, of AdamW's size, and of the blocks' matrices alone."""

import pytest
import torch
from torch import nn

from dist_llm.config.optim_sections import AdamWConfig, MuonConfig, OptimConfig
from dist_llm.optim.build_optimizer import build_optimizer, select_muon_params
from dist_llm.optim.muon import newton_schulz, orthogonalize


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16), (1, 8)])
def test_newton_schulz_brings_every_singular_value_near_one(shape: tuple[int, int]) -> None:
    """Against the SVD: the same singular vectors, values in 0.67 ... 1.21 where the input has 0.01 ... 1."""
    generator = torch.Generator().manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -2, min(shape), dtype=torch.float64)
    matrix = (u * values) @ vt
    (got,) = newton_schulz(1e3 * matrix[None].float()).double()
    in_its_axes = u.T @ got @ vt.T
    diagonal = in_its_axes.diagonal()
    assert ((diagonal > 0.67) & (diagonal < 1.21)).all(), diagonal
    assert (in_its_axes - diagonal.diag()).abs().max() < 1e-3


def test_matrices_of_one_shape_are_a_batch_and_stay_in_order() -> None:
    every = [torch.randn(4, 8), torch.randn(8, 4), torch.randn(4, 8)]
    for got, matrix in zip(orthogonalize(every), every, strict=True):
        torch.testing.assert_close(got, newton_schulz(matrix[None])[0])


def test_zero_stays_zero_and_a_tiny_gradient_counts_as_a_large_one() -> None:
    assert not newton_schulz(torch.zeros(1, 4, 4)).any()
    matrix = torch.randn(1, 4, 4)
    torch.testing.assert_close(newton_schulz(1e-12 * matrix), newton_schulz(matrix), rtol=1e-4, atol=1e-5)


def parameters() -> dict[str, nn.Parameter]:
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


def steps(config: OptimConfig, count: int = 3) -> dict[str, torch.Tensor]:
    held = parameters()
    optimizer = build_optimizer(config, held.items())
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        for parameter in held.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return {name: each.detach() for name, each in held.items()}


def test_matrices_of_blocks_are_muons_and_all_else_adamws() -> None:
    muon = steps(MuonConfig(lr=0.01, weight_decay=0.1))
    adamw = steps(AdamWConfig(lr=0.01, weight_decay=0.1))
    others = [name for name in muon if not torch.equal(muon[name], adamw[name])]
    assert (
        others
        == list(select_muon_params(parameters().items()))
        == [
            "blocks.0.attention.q.weight",
            "blocks.0.feedforward.up.weight",
        ]
    )


def test_three_steps_are_those_of_the_definition() -> None:
    """Nesterov momentum, decay times the rate, 0.2 sqrt(larger side), in fp64."""
    rate, decay, beta, name = 0.01, 0.1, 0.9, "blocks.0.feedforward.up.weight"
    got = steps(MuonConfig(lr=rate, weight_decay=decay, muon_momentum=beta))[name]
    weight, momentum = parameters()[name].detach().double(), torch.zeros(12, 4, dtype=torch.float64)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        drawn = {n: torch.randn(p.shape, generator=generator) for n, p in parameters().items()}
        gradient = drawn[name].double()
        momentum = beta * momentum + (1 - beta) * gradient
        update = newton_schulz((beta * momentum + (1 - beta) * gradient)[None])[0]
        weight = weight * (1 - rate * decay) - rate * 0.2 * 12**0.5 * update
    torch.testing.assert_close(got.double(), weight, rtol=1e-5, atol=1e-6)


def test_an_update_has_the_size_of_adamws() -> None:
    """Of a large random gradient: AdamW's first step has an RMS of 1, Muon's 0.2 times the scale of Liu et al."""
    held = nn.Parameter(torch.zeros(64, 96))
    optimizer = build_optimizer(MuonConfig(lr=1.0, weight_decay=0.0), [("blocks.0.w", held)])
    held.grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    assert held.detach().square().mean().sqrt() == pytest.approx(0.2, rel=0.15)


def test_a_matrix_without_a_gradient_goes_on_by_its_momentum() -> None:
    held = nn.Parameter(torch.zeros(4, 4))
    optimizer = build_optimizer(MuonConfig(lr=1.0, weight_decay=0.0), [("blocks.0.w", held)])
    held.grad = torch.eye(4)
    optimizer.step()
    before = held.detach().clone()
    assert held.grad is None
    optimizer.step()
    assert (held - before).diagonal().abs().min() > 0.1
