"""A checkpoint of a model with experts resumes in another layout, and its buffers with it.

As in test_reshape.py, a run takes two steps in each of two layouts and is compared with four steps of one process.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from dist_llm.config.schema import Config
from tests.laws.law import assert_close, make_layout_config, use_default_dtype
from tests.laws.layouts import ADAMW, MUON, Layout
from tests.laws.test_reshape import RunResult, run_steps
from tests.laws.worlds import run_on_ranks

ONE = Layout(ranks=1)
REPLICATED = Layout(ranks=2, parallel={"dp_replicate": 2})
SHARDED = Layout(ranks=2, parallel={"dp_shard": 2}, micro_batch=4)
SHARDED_EP = Layout(ranks=2, parallel={"dp_shard": 2, "ep": 2}, micro_batch=4)
UNEVEN = Layout(ranks=3, parallel={"dp_shard": 3})
TENSOR = Layout(ranks=2, parallel={"tp": 2})
TENSOR_EP = Layout(ranks=2, parallel={"tp": 2, "ep": 2, "sequence_parallel": False})
CONTEXT_EP = Layout(ranks=2, parallel={"cp": 2, "ep": 2})
PIPELINE = Layout(ranks=2, parallel={"pp": 2}, micro_batch=6)
FOUR_EP_2 = Layout(ranks=4, parallel={"dp_shard": 4, "ep": 2})
FOUR_EP_4 = Layout(ranks=4, parallel={"dp_shard": 2, "tp": 2, "ep": 4})
HYBRID_EP = Layout(ranks=4, parallel={"dp_replicate": 2, "dp_shard": 2, "ep": 2})
PIPELINE_EP = Layout(ranks=4, parallel={"pp": 2, "dp_shard": 2, "ep": 2, "pp_schedule": "zbv"}, micro_batch=3)

Case = tuple[Layout, Layout, str, dict[str, Any]]  # first layout, second layout, model, optimizer

CASES: list[Case] = [
    (SHARDED_EP, TENSOR_EP, "deepseek", ADAMW),
    (SHARDED, SHARDED_EP, "moe", MUON),
    (TENSOR, PIPELINE, "deepseek", MUON),
]
MORE_CASES: list[Case] = [
    (FOUR_EP_4, ONE, "moe", ADAMW),
    (ONE, FOUR_EP_4, "deepseek", ADAMW),
    (FOUR_EP_2, FOUR_EP_4, "moe", MUON),
    (FOUR_EP_4, SHARDED, "deepseek", MUON),
    (PIPELINE_EP, CONTEXT_EP, "deepseek", ADAMW),
    (CONTEXT_EP, PIPELINE_EP, "moe", MUON),
    (REPLICATED, HYBRID_EP, "deepseek", ADAMW),
    (UNEVEN, FOUR_EP_2, "moe", ADAMW),
    (HYBRID_EP, UNEVEN, "deepseek", MUON),
    (PIPELINE, TENSOR_EP, "moe", ADAMW),
]


def make_case_config(layout: Layout, model: str, optim: dict[str, Any]) -> Config:
    """Return the config of a layout of a case."""
    return make_layout_config(replace(layout, model=model), optim=optim)


def run_steps_in_fp64(
    config: Config, directory: Path | None, steps: range, lost: Literal["buffers"] | None = None
) -> RunResult:
    """Call `run_steps` in fp64, so that no rounding error changes the choice of an expert."""
    with use_default_dtype(torch.float64):
        return run_steps(config, directory, steps, lost)


@lru_cache(maxsize=8)
def run_uninterrupted(config_json: str) -> RunResult:
    """Run four steps in one process. The config is given as JSON, because a cache needs a hashable argument."""
    return run_steps_in_fp64(Config.model_validate_json(config_json), None, range(4))


def assert_case_matches_one_process(case: Case, directory: Path, lost: Literal["buffers"] | None = None) -> None:
    """Run two steps in each layout of the case; compare the losses and the final state with one process.

    `lost` plants a bug: this state is lost at the load.
    """
    first, second, model, optim = case
    losses: list[float] = []
    for layout, steps in ((first, range(2)), (second, range(2, 4))):
        config = make_case_config(layout, model, optim)
        results = run_on_ranks(layout.ranks, run_steps_in_fp64, config, directory, steps, lost)
        assert all(result.losses == results[0].losses for result in results)
        losses += results[0].losses
    actual_state = {name: value for result in results for name, value in result.state.items()}
    uninterrupted = run_uninterrupted(make_case_config(ONE, model, optim).model_dump_json())
    expected_state = uninterrupted.state
    assert actual_state.keys() == expected_state.keys()
    assert any(name.endswith("feedforward.previous_load") for name in expected_state)
    for name, expected in expected_state.items():
        assert_close(name, actual_state[name], expected, tolerance=1e-9, noise=1e-13)
    assert losses == pytest.approx(uninterrupted.losses, rel=1e-11)


def name_case(case: Case) -> str:
    """Return a short name of a case."""
    *layouts, model, optim = case
    return " then ".join(replace(layout, model=model).name for layout in layouts) + f", {optim['name']}"


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES)], ids=name_case
)
def test_a_run_with_experts_resumes_in_another_layout(case: Case, tmp_path: Path) -> None:
    assert_case_matches_one_process(case, tmp_path)


def test_lost_buffers_are_detected(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="off by"):
        assert_case_matches_one_process(CASES[0], tmp_path, lost="buffers")
