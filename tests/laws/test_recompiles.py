"""Blocks are compiled in the first three steps only, on each layout, also with evaluations and probes in between."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from dist_llm.config.schema import Config
from dist_llm.engines.measure_probe import measure_probe
from dist_llm.engines.native import NativeEngine
from dist_llm.training.step import train_step
from tests.laws.law import make_batches, make_config
from tests.laws.layouts import ADAMW
from tests.laws.worlds import get_world, restart_world

RECOMPILED_LAYOUTS: list[Any] = [
    (1, {}),
    (2, {"dp_shard": 2}),
    pytest.param(2, {"tp": 2}, marks=pytest.mark.slow),
    pytest.param(2, {"dp_shard": 2, "recompute": "selective"}, marks=pytest.mark.slow),
    pytest.param(4, {"dp_shard": 2, "tp": 2, "recompute": "full"}, marks=pytest.mark.slow),
]


def count_graphs(config: Config) -> list[int]:
    """Return the number of compiled graphs after each step.

    As in training, an evaluation and the probes of checkpoints run between the steps.
    """
    counters.clear()
    engine, graphs = NativeEngine(config, torch.device("cpu")), []
    for step in range(6):
        batches = make_batches(config, engine, step)
        train_step(engine, batches, lr=1e-3, step=step)
        if step == 2:
            engine.score(engine.to_local_batch(batches[0]))
        if step >= 3:
            measure_probe(engine, config)
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.parametrize(("ranks", "parallel"), RECOMPILED_LAYOUTS)
def test_no_graph_is_compiled_after_step_3(ranks: int, parallel: dict[str, Any]) -> None:
    config = make_config(ranks=ranks, optim=ADAMW, data={"micro_batch": 4}, parallel=parallel, compile=True)
    restart_world(ranks)
    for graphs in get_world(ranks).run(count_graphs, config):
        assert graphs[0] > 0, "the blocks must be compiled"
        assert graphs[3:] == [graphs[2]] * 3
