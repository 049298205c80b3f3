"""Rotary angles turn by distance; sinusoids are the paper's."""

import math

import pytest
import torch

from dist_llm.models.positional_encoding import apply_rotary, rotary_angles, sinusoidal_encoding

E = 8


def turned(x_SHE, positions, theta=10_000.0):
    angles = rotary_angles(torch.tensor(positions), E, theta)
    return apply_rotary(x_SHE[None], angles.cos(), angles.sin())[0]


def vectors(length, seed=0):
    return torch.randn(length, 2, E, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("theta", [100.0, 10_000.0, 500_000.0])
def test_a_score_depends_on_the_distance_alone(theta):
    q, k = vectors(1), vectors(1, seed=1)

    def score(m, n):
        return (turned(q, [m], theta) * turned(k, [n], theta)).sum(-1)

    for distance in (0, 1, 5):
        here = score(distance, 0)
        for shift in (1, 17, 300):
            torch.testing.assert_close(score(distance + shift, shift), here, rtol=1e-4, atol=1e-4)
    assert (score(3, 0) - score(0, 0)).abs().max() > 1e-2
    assert (score(3, 0) - score(0, 3)).abs().max() > 1e-2, "the direction counts"


def test_a_turn_keeps_lengths_and_place_zero_is_no_turn():
    x = vectors(5)
    assert torch.equal(turned(x[:1], [0]), x[:1])
    torch.testing.assert_close(turned(x, [0, 1, 2, 50, 1000]).norm(dim=-1), x.norm(dim=-1))


def test_pairs_are_halves_as_in_hugging_face():
    """A unit vector at i turns in the plane of i and i + E/2, by m * theta^(-2i/E)."""
    for i in range(E // 2):
        x = torch.zeros(1, 1, E)
        x[..., i] = 1
        angle = 3 * 10_000.0 ** (-2 * i / E)
        want = torch.zeros(1, 1, E)
        want[..., i], want[..., i + E // 2] = math.cos(angle), math.sin(angle)
        torch.testing.assert_close(turned(x, [3]), want)


def test_the_turn_is_computed_in_fp32_and_given_back_in_the_type_it_came_in():
    x = vectors(3).bfloat16()
    got = turned(x, [0, 100, 4000])
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, turned(x.float(), [0, 100, 4000]).bfloat16())


@pytest.mark.parametrize("d_model", [2, 6, 7, 64])
def test_sinusoids_are_the_papers(d_model):
    positions = torch.tensor([0, 1, 5, 511])
    got = sinusoidal_encoding(positions, d_model)
    assert got.shape == (4, d_model)
    for row, position in zip(got, positions.tolist(), strict=True):
        for column in range(d_model):
            angle = position / 10_000 ** (column // 2 * 2 / d_model)
            want = math.cos(angle) if column % 2 else math.sin(angle)
            assert float(row[column]) == pytest.approx(want, abs=1e-4)
