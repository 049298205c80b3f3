"""Microbatches, ranks and whole steps without a scored token: no NaN, and nobody waits for anybody."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dist_llm.engines.native import NativeEngine
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.train.step import train_step
from tests.laws.law import batches_of, config_of, full_tensor
from tests.laws.layouts import MODELS, SGD, Layout
from tests.laws.worlds import world

LAYOUTS = [
    Layout(1, {}, micro=4),
    Layout(2, {"dp_shard": 2}, "bert", 4),
    Layout(2, {"dp_replicate": 2}, "t5", 4),
    Layout(2, {"tp": 2}, "bert", 8),
    Layout(2, {"cp": 2}, micro=8),
    Layout(2, {"pp": 2}, "two", 6),
]


def steps(config: Any) -> tuple[list[float], list[int], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Three steps: one with an empty microbatch and an empty rank, one with nothing at all, one whole."""
    engine = NativeEngine(config, torch.device("cpu"))
    losses, scored, kept = [], [], []
    for step in range(3):
        batches = batches_of(config, engine, step)
        last = engine.dp_rank_and_size[0] == engine.dp_rank_and_size[1] - 1 and engine.dp_rank_and_size[1] > 1
        empty = [0] if step == 0 and not last else list(range(len(batches))) if step < 2 else []
        for place in empty:
            nothing = torch.full_like(batches[place].targets_BS, IGNORE)
            batches[place] = replace(batches[place], targets_BS=nothing, num_valid_tokens=0)
        report = train_step(engine, batches, 1.0, step)
        losses.append(report.loss.item())
        scored.append(int(report.scored))
        assert math.isfinite(report.grad_norm.item())
        kept.append({name: full_tensor(parameter) for name, parameter in engine.named_parameters()})
    return losses, scored, kept[0], kept[1]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_scores_nothing_changes_nothing(layout: Layout) -> None:
    config = config_of(
        layout.ranks,
        MODELS[layout.model],
        optim=SGD,
        parallel=layout.parallel,
        data={"micro_batch": layout.micro},
    )
    found = world(layout.ranks).run(steps, config) if layout.ranks > 1 else [steps(config)]
    for losses, scored, before, after in found:
        assert (losses, scored) == found[0][:2], "all ranks report the same"
        assert all(map(math.isfinite, losses))
        assert scored[0] > 0
        assert (losses[1], scored[1]) == (0.0, 0)
        assert scored[2] > scored[0]
        for name, value in after.items():
            assert torch.equal(value, before[name]), f"{name} moved though nothing was scored"
