"""The same global batch on 1, 2 or 4 ranks, sharded, replicated or both: the same losses and samples."""

from collections.abc import Callable
from pathlib import Path

import pytest

from . import commands
from .conftest import ONE, REPLICATED, SHARDED, Layout

TORCHRUN_ONE = Layout(1)
SHARDED_4 = Layout(4)  # dp_shard -1: all that is left
HYBRID = Layout(4, ("parallel.dp_replicate=2", "parallel.dp_shard=2"))


@pytest.mark.parametrize("layout", [TORCHRUN_ONE, SHARDED, REPLICATED, SHARDED_4, HYBRID], ids=str)
def test_twenty_losses_do_not_depend_on_the_layout(layout: Layout, straight: Callable[[Layout], Path]) -> None:
    want, got = commands.metrics(straight(ONE)), commands.metrics(straight(layout))

    assert commands.column(got, "loss") == pytest.approx(commands.column(want, "loss"), rel=1e-5, abs=0)
    assert commands.column(got, "grad_norm") == pytest.approx(commands.column(want, "grad_norm"), rel=1e-4, abs=0)
    for exact in ("step", "lr", "tokens"):
        assert commands.column(got, exact) == commands.column(want, exact)
    assert commands.progress(commands.newest(straight(layout))).items() >= {"samples": 320, "tokens": 40960}.items()
    assert len(list((straight(layout) / "logs").glob("rank_*.log"))) == max(1, layout.ranks)
