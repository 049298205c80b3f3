"""Many engines and thousands of steps in the same processes do not crash. Each round repeats the losses of the first.

With two worker threads per gloo group, one of ten runs of 20 steps of an encoder-decoder with pp 2 and tp 2 ended with
a segmentation fault. `dist_llm/compat.py:use_one_thread_per_gloo_group` prevents this.
"""

import itertools
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch

from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.parallel import p2p_collectives
from dist_llm.training.step import train_step
from tests.laws.law import make_batches, make_config
from tests.laws.layouts import MODELS
from tests.laws.run_space import ACTIVATION_BUDGET_BYTES
from tests.laws.worlds import get_world

RANKS = 4
ROUNDS = 5
STEPS_PER_ENGINE = 20
BUDGET_GIB = ACTIVATION_BUDGET_BYTES / RANKS / (1 << 30)
PARALLEL_SECTIONS = (
    {"pp": 2, "tp": 2, "pp_schedule": "gpipe", "activations_gib": BUDGET_GIB},
    {"pp": 2, "tp": 2},
    {"dp_shard": 2, "tp": 2, "activations_gib": BUDGET_GIB},
    {"dp_replicate": 2, "tp": 2, "recompute": "full"},
    {"pp": 2, "dp_shard": 2, "recompute": "selective"},
    {"dp_replicate": 2, "dp_shard": 2, "reshard": "always"},
)
PIPELINE_CASES = list(itertools.product(PARALLEL_SECTIONS, ("bart", "encoder_decoder")))


def train(config: Config, uses_p2p: bool) -> list[float]:
    """Return the losses of STEPS_PER_ENGINE steps, with collectives or with point-to-point messages."""
    p2p_on_cpus = patch.object(p2p_collectives, "uses_p2p", lambda device: device == "cpu")
    with p2p_on_cpus if uses_p2p else nullcontext():
        engine = NativeEngine(config, torch.device("cpu"))
        return [
            train_step(engine, make_batches(config, engine, step=0), lr=1e-3, step=step).loss.item()
            for step in range(STEPS_PER_ENGINE)
        ]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("uses_p2p", [False, True], ids=["collectives", "messages"])
def test_many_engines_in_one_world_compute_the_same_losses(uses_p2p: bool) -> None:
    world = get_world(RANKS)
    first_losses: dict[int, list[float]] = {}
    for _ in range(ROUNDS):
        for layout_index, (parallel, model) in enumerate(PIPELINE_CASES):
            config = make_config(ranks=RANKS, model=MODELS[model], data={"micro_batch": 3}, parallel=parallel)
            losses_by_rank = world.run(train, config, uses_p2p)
            assert all(losses == losses_by_rank[0] for losses in losses_by_rank)
            expected = first_losses.setdefault(layout_index, losses_by_rank[0])
            assert losses_by_rank[0] == expected, "this round computes other losses than the first"
    assert world.is_alive
