"""The metrics of a mixture of experts: loads, balance losses, the warning of dead experts and the heat map."""

import logging

import numpy as np
import pytest
import torch

from dist_llm.models.router_stats import RouterStats
from dist_llm.observe.router_metrics import CELL_PIXELS, RouterMetrics, draw_load


def make_stats(*counts: float, balance: float = 1.0) -> RouterStats:
    return RouterStats(torch.tensor(counts), torch.tensor(balance), torch.tensor(0.5), torch.tensor(1.25))


def test_a_step_reports_the_largest_load_and_the_idle_experts_of_all_layers() -> None:
    (row,) = RouterMetrics().summarize([{1: make_stats(4, 4, 4, 4), 3: make_stats(12, 4, 0, 0, balance=2.0)}])
    assert row["expert_load_max_over_mean"] == 3.0
    assert row["idle_experts"] == 2
    assert row["balance_loss"] == 1.5
    assert row["router_z_loss"] == 0.5
    assert row["router_entropy"] == 1.25
    assert row["expert_load"] == {"1": [0.25] * 4, "3": [0.75, 0.25, 0.0, 0.0]}


def test_the_last_step_has_the_load_of_the_interval() -> None:
    first, last = RouterMetrics().summarize([{0: make_stats(4, 0)}, {0: make_stats(0, 12)}])
    assert "expert_load" not in first
    assert last["expert_load"] == {"0": [0.25, 0.75]}
    assert (first["idle_experts"], last["idle_experts"]) == (1, 1)


def test_a_model_without_experts_has_no_metrics_of_routers() -> None:
    assert RouterMetrics().summarize([{}, {}]) == [{}, {}]


def test_a_dead_expert_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    metrics = RouterMetrics()
    with caplog.at_level(logging.WARNING, logger="dist_llm"):
        metrics.summarize([{2: make_stats(0, 4, 4)}, {2: make_stats(2, 4, 4)}])
        assert not caplog.messages  # one token in the interval is enough
        metrics.summarize([{2: make_stats(0, 4, 4)}])
        metrics.summarize([{2: make_stats(0, 4, 4)}])
        assert len(caplog.messages) == 1
        assert "no token chose expert 0 of layer 2 in the last 1 steps" in caplog.messages[0]
        metrics.summarize([{2: make_stats(0, 0, 4)}])
    assert "0 of layer 2, 1 of layer 2" in caplog.messages[1]


def test_the_heat_map_shows_idle_and_overloaded_experts() -> None:
    image = draw_load({"0": [0.25, 0.25, 0.5, 0.0], "1": [0.5, 0.5]})
    assert image.shape == (2 * CELL_PIXELS, 4 * CELL_PIXELS, 3)
    cells = image[::CELL_PIXELS, ::CELL_PIXELS]
    white, red, blue, grey = [255, 255, 255], [255, 0, 0], [0, 0, 255], [128, 128, 128]
    np.testing.assert_array_equal(cells, [[white, white, red, blue], [white, white, grey, grey]])
