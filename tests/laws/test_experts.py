"""Mixtures of experts compute the steps of one process with each optimizer, recompute mode and compiled blocks.

`test_layouts.py` compares all layouts, `test_covering.py` pairs of settings, and `test_planted_bugs.py` plants bugs.
"""

from typing import Any

import pytest

from tests.laws.law import assert_matches_one_process
from tests.laws.layouts import ADAMW, CLIPPED_SGD, MUON, Layout

MODELS_WITH_EXPERTS = ("moe", "deepseek")
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"ranks": 2, "parallel": {"dp_shard": 2, "ep": 2}, "micro_batch": 4},
    "tensor": {"ranks": 4, "parallel": {"dp_shard": 2, "tp": 2, "ep": 2}, "micro_batch": 3},
    "pipeline": {"ranks": 4, "parallel": {"pp": 2, "dp_shard": 2, "ep": 2}, "micro_batch": 3},
}


def build_layout(name: str, model: str) -> Layout:
    return Layout(**LAYOUTS[name], model=model)


@pytest.mark.slow
@pytest.mark.parametrize("optim", [CLIPPED_SGD, ADAMW, MUON], ids=["sgd", "adamw", "muon"])
@pytest.mark.parametrize("model", MODELS_WITH_EXPERTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_twenty_steps_of_each_optimizer(layout: str, model: str, optim: dict[str, Any]) -> None:
    """Selection biases move in each step, and Muon orthogonalizes the matrix of each expert."""
    assert_matches_one_process(build_layout(layout, model), optim=optim, steps=20)


@pytest.mark.slow
@pytest.mark.parametrize(
    "recompute",
    [{"recompute": "full"}, {"recompute": "selective"}, {"activations_gib": 0.0005}],
    ids=["full", "selective", "budget"],
)
@pytest.mark.parametrize("model", MODELS_WITH_EXPERTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputation_does_not_change_the_step(layout: str, model: str, recompute: dict[str, Any]) -> None:
    assert_matches_one_process(build_layout(layout, model), optim=CLIPPED_SGD, steps=3, parallel=recompute)


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("model", MODELS_WITH_EXPERTS)
@pytest.mark.parametrize("layout", ["data", "tensor"])
def test_compilation_does_not_change_the_step(layout: str, model: str, recompute: str) -> None:
    """Three sequences per microbatch on two tensor ranks: torch 2.13 compiled index_add_ to lose counts there."""
    assert_matches_one_process(
        build_layout(layout, model), optim=CLIPPED_SGD, steps=3, parallel={"recompute": recompute}, compile=True
    )
