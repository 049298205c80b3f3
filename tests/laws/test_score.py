"""Evaluation, too, gives one process's loss on any layout, and disturbs no training around it."""

import pytest
import torch

from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.train.step import train_step
from tests.laws.law import batches_of, config_of
from tests.laws.layouts import MODELS, SGD, Layout
from tests.laws.worlds import world

LAYOUTS = [
    Layout(2, {"dp_shard": 2}, "tied"),
    Layout(2, {"tp": 2}, "tied"),
    Layout(2, {"cp": 2}, "tied"),
    Layout(2, {"pp": 2}, "tied", 6),
    Layout(2, {"pp": 2, "pp_schedule": "zbv"}, "tied", 6),
    Layout(4, {"pp": 2, "dp_shard": 2}, "tied", 3),
    Layout(4, {"cp": 2, "tp": 2}, "tied"),
]


def scores(config: Config) -> list[float]:
    """The summed loss of a batch before, between and after two training steps that it is not part of."""
    engine, found = NativeEngine(config, torch.device("cpu")), []
    for step in range(3):
        heldout = [engine.cut(batch) for batch in batches_of(config, engine, 100)]
        found.append(sum(engine.total(engine.score(batch).sum()).item() for batch in heldout))
        train_step(engine, batches_of(config, engine, step), config.optim.lr, step)
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_scores_as_one_process_does(layout: Layout) -> None:
    model = MODELS[layout.model] | {"dropout": 0.0}
    config = config_of(layout.ranks, model, optim=SGD, parallel=layout.parallel, data={"micro_batch": layout.micro})
    want = scores(config_of(1, model, optim=SGD))
    for rank, found in enumerate(world(layout.ranks).run(scores, config)):
        assert found == pytest.approx(want, rel=1e-5), f"rank {rank}"
