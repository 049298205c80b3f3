"""A microbatch, a rank or a full step without a valid token produces no NaN and no deadlock."""

import math
from dataclasses import dataclass, field, replace

import pytest
import torch

from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.training.step import train_step
from tests.laws.law import copy_full_tensor, make_batches, make_layout_config
from tests.laws.layouts import SGD, Layout
from tests.laws.worlds import run_on_ranks

LAYOUTS = [
    Layout(ranks=1, micro_batch=4),
    Layout(ranks=2, parallel={"dp_shard": 2}, model="bert", micro_batch=4),
    Layout(ranks=2, parallel={"dp_replicate": 2}, model="t5", micro_batch=4),
    Layout(ranks=2, parallel={"tp": 2}, model="bert", micro_batch=8),
    Layout(ranks=2, parallel={"cp": 2}, micro_batch=8),
    Layout(ranks=2, parallel={"pp": 2}, model="encoder_decoder", micro_batch=6),
]


@dataclass
class RecordedSteps:
    """The loss and the number of valid tokens of each step, and the full weights after it."""

    losses: list[float] = field(default_factory=list)
    loss_denominators: list[float] = field(default_factory=list)
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)


def run_steps(config: Config) -> RecordedSteps:
    """Run the steps 0 to 2 on this rank.

    In step 0 the last data-parallel rank has no valid token, and the first microbatch of the other ranks has none. In
    step 1 no rank has a valid token. Step 2 is normal.
    """
    engine = NativeEngine(config, torch.device("cpu"))
    recorded = RecordedSteps()
    dp_rank, dp_size = engine.dp_rank_and_size
    is_last_of_several = dp_rank == dp_size - 1 and dp_size > 1
    for step in range(3):
        batches = make_batches(config, engine, step)
        if step == 0 and not is_last_of_several:
            empty_indices = [0]
        else:
            empty_indices = list(range(len(batches))) if step < 2 else []
        for index in empty_indices:
            ignored_targets = torch.full_like(batches[index].targets_BS, IGNORE_INDEX)
            batches[index] = replace(batches[index], targets_BS=ignored_targets, num_valid_tokens=0)
        report = train_step(engine, batches, lr=1.0, step=step)
        recorded.losses.append(report.loss.item())
        recorded.loss_denominators.append(report.loss_denominator.item())
        assert math.isfinite(report.grad_norm.item())
        recorded.weights.append({name: copy_full_tensor(parameter) for name, parameter in engine.named_parameters()})
    return recorded


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_without_valid_tokens_changes_no_weight(layout: Layout) -> None:
    by_rank = run_on_ranks(layout.ranks, run_steps, make_layout_config(layout, optim=SGD))
    for steps in by_rank:
        assert (steps.losses, steps.loss_denominators) == (by_rank[0].losses, by_rank[0].loss_denominators), (
            "ranks report different results"
        )
        assert all(map(math.isfinite, steps.losses))
        assert steps.loss_denominators[0] > 0
        assert (steps.losses[1], steps.loss_denominators[1]) == (0.0, 0)
        assert steps.loss_denominators[2] > steps.loss_denominators[0]
        for name, value in steps.weights[1].items():
            assert torch.equal(value, steps.weights[0][name]), f"{name} changed in a step without valid tokens"
