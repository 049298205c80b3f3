"""Coordinate check: activations grow with width or depth in the standard parametrization, and not under muP, CompleteP.

The planted faults leave out one factor of the parametrization.
"""

from dataclasses import replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.coordinate_check import BASE_DEPTH, BASE_WIDTH, PARAMETRIZATIONS, compute_slopes, measure_activations
from dist_llm.models import decoder, parametrization

MAX_SLOPE = 0.4  # of log2(activation) over log2(size); the largest slope of a correct parametrization is 0.3
WIDTHS, DEPTHS = (BASE_WIDTH, 4 * BASE_WIDTH), (BASE_DEPTH, 4 * BASE_DEPTH)


@cache
def measure_base() -> dict[str, float]:
    """All parametrizations are equal in the base model."""
    return measure_activations(None, BASE_WIDTH, BASE_DEPTH)


def width_slopes(name: str) -> dict[str, float]:
    wide = measure_activations(PARAMETRIZATIONS[name], WIDTHS[1], BASE_DEPTH)
    return compute_slopes(WIDTHS, [measure_base(), wide])


def depth_slopes(name: str) -> dict[str, float]:
    deep = measure_activations(PARAMETRIZATIONS[name], BASE_WIDTH, DEPTHS[1])
    return compute_slopes(DEPTHS, [measure_base(), deep])


def test_activations_grow_with_the_width_in_the_standard_parametrization() -> None:
    slopes = width_slopes("standard")
    assert min(slopes["last block"], slopes["last block.attention"], slopes["last block.feedforward"]) > 1
    assert slopes["head"] > MAX_SLOPE


def test_activations_do_not_grow_with_the_width_under_mup() -> None:
    assert all(abs(slope) < MAX_SLOPE for slope in width_slopes("mup").values())


def test_an_unscaled_learning_rate_of_hidden_matrices_is_detected() -> None:
    original = parametrization._scale_spec

    def keep_learning_rate(*args: Any) -> Any:
        return replace(original(*args), lr_mult=1.0)

    with patch.object(parametrization, "_scale_spec", keep_learning_rate):
        assert width_slopes("mup")["last block"] > 1


def test_unscaled_logits_are_detected() -> None:
    with patch.object(decoder, "resolve_logit_scale", lambda config: config.logit_scale):
        assert width_slopes("mup")["head"] > MAX_SLOPE


def test_activations_grow_with_the_depth_without_scaled_residuals() -> None:
    assert depth_slopes("mup")["last block"] > 0.2
    assert abs(depth_slopes("completep")["last block"]) < 0.05


@pytest.mark.parametrize("name", ["mup", "completep"])
def test_the_base_model_trains_as_in_the_standard_parametrization(name: str) -> None:
    assert measure_activations(PARAMETRIZATIONS[name], BASE_WIDTH, BASE_DEPTH) == measure_base()
