"""Rotary scores depend only on the distance; sinusoidal encodings equal the paper."""

import math

import pytest
import torch

from dist_llm.models.positional_encoding import compute_sinusoidal_encoding
from dist_llm.models.rope import apply_rotary

E = 8


def rotate(x_SHE, positions, theta=10_000.0):
    """Return the vectors [S, H, E], rotated to these positions."""
    angles = torch.tensor(positions)[:, None] * theta ** -(torch.arange(0, E, 2) / E)
    return apply_rotary(x_SHE[None], angles.cos(), angles.sin())[0]


def vectors(length, seed=0):
    """Return random vectors [length, 2, E]."""
    return torch.randn(length, 2, E, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("theta", [100.0, 10_000.0, 500_000.0])
def test_rotary_score_depends_only_on_the_distance(theta):
    q, k = vectors(1), vectors(1, seed=1)

    def score(m, n):
        return (rotate(q, [m], theta) * rotate(k, [n], theta)).sum(-1)

    for distance in (0, 1, 5):
        expected = score(distance, 0)
        for shift in (1, 17, 300):
            torch.testing.assert_close(score(distance + shift, shift), expected, rtol=1e-4, atol=1e-4)
    assert (score(3, 0) - score(0, 0)).abs().max() > 1e-2
    assert (score(3, 0) - score(0, 3)).abs().max() > 1e-2, "the scores do not depend on the direction"


def test_rotation_keeps_vector_norms():
    x = vectors(5)
    assert torch.equal(rotate(x[:1], [0]), x[:1])
    torch.testing.assert_close(rotate(x, [0, 1, 2, 50, 1000]).norm(dim=-1), x.norm(dim=-1))


def test_rotary_pairs_match_hugging_face():
    """The unit vector of dimension i rotates by m * theta^(-2i/E) in the plane of dimensions i and i + E/2."""
    for i in range(E // 2):
        x = torch.zeros(1, 1, E)
        x[..., i] = 1
        angle = 3 * 10_000.0 ** (-2 * i / E)
        expected = torch.zeros(1, 1, E)
        expected[..., i], expected[..., i + E // 2] = math.cos(angle), math.sin(angle)
        torch.testing.assert_close(rotate(x, [3]), expected)


def test_rotation_computes_in_fp32():
    x = vectors(3).bfloat16()
    actual = rotate(x, [0, 100, 4000])
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, rotate(x.float(), [0, 100, 4000]).bfloat16())


@pytest.mark.parametrize("d_model", [2, 6, 7, 64])
def test_sinusoidal_encoding_matches_the_paper(d_model):
    positions = torch.tensor([0, 1, 5, 511])
    actual = compute_sinusoidal_encoding(positions, d_model)
    assert actual.shape == (4, d_model)
    for row, position in zip(actual, positions.tolist(), strict=True):
        for column in range(d_model):
            angle = position / 10_000 ** (column // 2 * 2 / d_model)
            expected = math.cos(angle) if column % 2 else math.sin(angle)
            assert float(row[column]) == pytest.approx(expected, abs=1e-4)
