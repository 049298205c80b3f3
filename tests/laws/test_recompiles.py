"""Blocks are compiled in the first steps, and not again: no layout has shapes or flags that change later."""

from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from dist_llm.config.schema import Config
from dist_llm.engines.measure_probe import measure_probe
from dist_llm.engines.native import NativeEngine
from dist_llm.train.step import train_step
from tests.laws.law import batches_of, config_of
from tests.laws.layouts import ADAMW
from tests.laws.worlds import restart_world, world

LAYOUTS: list[Any] = [
    (1, {}),
    (2, {"dp_shard": 2}),
    pytest.param(2, {"tp": 2}, marks=pytest.mark.slow),
    pytest.param(2, {"dp_shard": 2, "recompute": "selective"}, marks=pytest.mark.slow),
    pytest.param(4, {"dp_shard": 2, "tp": 2, "recompute": "full"}, marks=pytest.mark.slow),
]


def compiled(config: Config) -> list[int]:
    """How many graphs were compiled by the end of each step. A held-out loss is taken in between, as in training, and
    probes as for a checkpoint."""
    counters.clear()
    engine, found = NativeEngine(config, torch.device("cpu")), []
    for step in range(6):
        batches = batches_of(config, engine, step)
        train_step(engine, batches, 1e-3, step)
        if step == 2:
            engine.score(engine.to_local_batch(batches[0]))
        if step >= 3:
            measure_probe(engine, config)
        found.append(counters["stats"]["unique_graphs"])
    return found


@pytest.mark.parametrize(("ranks", "parallel"), LAYOUTS)
def test_nothing_is_compiled_after_step_3(ranks: int, parallel: dict[str, Any]) -> None:
    config = config_of(ranks, {}, optim=ADAMW, data={"micro_batch": 4}, parallel=parallel, compile=True)
    restart_world(ranks)
    for found in world(ranks).run(compiled, config):
        assert found[0] > 0, "blocks are compiled"
        assert found[3:] == [found[2]] * 3
