"""A microbatch, a rank or a full step without a valid token produces no NaN and no deadlock."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dist_llm.engines.native import NativeEngine
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.training.step import train_step
from tests.laws.law import copy_full_tensor, make_batches, make_config
from tests.laws.layouts import MODELS, SGD, Layout
from tests.laws.worlds import get_world

LAYOUTS = [
    Layout(ranks=1, micro_batch=4),
    Layout(ranks=2, parallel={"dp_shard": 2}, model="bert", micro_batch=4),
    Layout(ranks=2, parallel={"dp_replicate": 2}, model="t5", micro_batch=4),
    Layout(ranks=2, parallel={"tp": 2}, model="bert", micro_batch=8),
    Layout(ranks=2, parallel={"cp": 2}, micro_batch=8),
    Layout(ranks=2, parallel={"pp": 2}, model="encoder_decoder", micro_batch=6),
]


def run_steps(config: Any) -> tuple[list[float], list[int], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Run steps 0 to 2; return losses and numbers of valid tokens, and the weights after step 0 and after step 1.

    In step 0 the last data-parallel rank has no valid token, and the first microbatch of the other ranks has none. In
    step 1 no rank has a valid token. Step 2 is normal.
    """
    engine = NativeEngine(config, torch.device("cpu"))
    losses, num_valid_tokens, weights = [], [], []
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
        losses.append(report.loss.item())
        num_valid_tokens.append(int(report.num_valid_tokens))
        assert math.isfinite(report.grad_norm.item())
        weights.append({name: copy_full_tensor(parameter) for name, parameter in engine.named_parameters()})
    return losses, num_valid_tokens, weights[0], weights[1]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_step_without_valid_tokens_changes_no_weight(layout: Layout) -> None:
    config = make_config(
        ranks=layout.ranks,
        model=MODELS[layout.model],
        optim=SGD,
        parallel=layout.parallel,
        data={"micro_batch": layout.micro_batch},
    )
    by_rank = get_world(layout.ranks).run(run_steps, config) if layout.ranks > 1 else [run_steps(config)]
    for losses, num_valid_tokens, before, after in by_rank:
        assert (losses, num_valid_tokens) == by_rank[0][:2], "ranks report different results"
        assert all(map(math.isfinite, losses))
        assert num_valid_tokens[0] > 0
        assert (losses[1], num_valid_tokens[1]) == (0.0, 0)
        assert num_valid_tokens[2] > num_valid_tokens[0]
        for name, value in after.items():
            assert torch.equal(value, before[name]), f"{name} changed in a step without valid tokens"
