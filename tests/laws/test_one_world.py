"""Many engines and thousands of steps in one world do not crash.

They do: an encoder-decoder with pp 2 and tp 2 ends with a segmentation fault of a rank in about one of ten runs of 20
steps, under 1f1b and gpipe, with and without an activation budget (torch 2.13). A core dump shows a thread of gloo in
malloc, called by `AsyncAllreduceWork::allreduce`: its free list of small blocks is damaged, so some code wrote to a
block after it was freed. Which code did is not known yet.
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
from tests.laws.space import ACTIVATION_BUDGET
from tests.laws.worlds import WorldError, world

RANKS = 4
ROUNDS = 12
STEPS = 20  # per engine
BUDGET_GIB = ACTIVATION_BUDGET / RANKS / (1 << 30)
PARALLEL = (
    {"pp": 2, "tp": 2, "pp_schedule": "gpipe", "activations_gib": BUDGET_GIB},
    {"pp": 2, "tp": 2},
    {"dp_shard": 2, "tp": 2, "activations_gib": BUDGET_GIB},
    {"dp_replicate": 2, "tp": 2, "recompute": "full"},
    {"pp": 2, "dp_shard": 2, "recompute": "selective"},
    {"dp_replicate": 2, "dp_shard": 2, "reshard": "always"},
)
LAYOUTS = list(itertools.product(PARALLEL, ("bart", "two")))


def train(config: Config, messages: bool) -> list[float]:
    """Return the losses of STEPS steps, with collectives or with point-to-point messages."""
    is_cpu = patch.object(p2p_collectives, "uses_p2p", lambda device: device == "cpu")
    with is_cpu if messages else nullcontext():
        engine = NativeEngine(config, torch.device("cpu"))
        return [train_step(engine, make_batches(config, engine, 0), 1e-3, step).loss.item() for step in range(STEPS)]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.xfail(raises=WorldError, strict=False, reason="memory of a rank is damaged; under investigation")
@pytest.mark.parametrize("messages", [False, True])
def test_many_engines_in_one_world(messages: bool) -> None:
    ranks = world(RANKS)
    first_losses: dict[int, list[float]] = {}
    for _ in range(ROUNDS):
        for number, (parallel, model) in enumerate(LAYOUTS):
            config = make_config(RANKS, MODELS[model], data={"micro_batch": 3}, parallel=parallel)
            by_rank = ranks.run(train, config, messages)
            assert all(losses == by_rank[0] for losses in by_rank)
            assert by_rank[0] == first_losses.setdefault(number, by_rank[0]), "each round computes the same"
    assert ranks.alive
