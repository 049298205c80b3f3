"""Runs on 1, 2 or 4 ranks, sharded, replicated or both, have the losses of a run on one process."""

from collections.abc import Callable
from pathlib import Path

import pytest

from . import commands
from .conftest import ONE_PROCESS, REPLICATED, SHARDED, Layout

TORCHRUN_ONE = Layout(ranks=1)
SHARDED_4 = Layout(ranks=4)  # dp_shard -1: all remaining ranks
HYBRID = Layout(ranks=4, overrides=("parallel.dp_replicate=2", "parallel.dp_shard=2"))


@pytest.mark.parametrize("layout", [TORCHRUN_ONE, SHARDED, REPLICATED, SHARDED_4, HYBRID], ids=str)
def test_twenty_losses_do_not_depend_on_the_layout(layout: Layout, uninterrupted_run: Callable[[Layout], Path]) -> None:
    expected = commands.read_step_rows(uninterrupted_run(ONE_PROCESS))
    actual = commands.read_step_rows(uninterrupted_run(layout))

    assert commands.get_column(actual, "loss") == pytest.approx(commands.get_column(expected, "loss"), rel=1e-5, abs=0)
    assert commands.get_column(actual, "grad_norm") == pytest.approx(
        commands.get_column(expected, "grad_norm"), rel=1e-4, abs=0
    )
    for metric in ("step", "lr", "tokens"):
        assert commands.get_column(actual, metric) == commands.get_column(expected, metric)
    assert (
        commands.read_progress(commands.find_latest_checkpoint(uninterrupted_run(layout))).items()
        >= {"samples": 320, "tokens": 40960}.items()
    )
    assert len(list((uninterrupted_run(layout) / "logs").glob("rank_*.log"))) == max(1, layout.ranks)
