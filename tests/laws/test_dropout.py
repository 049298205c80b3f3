"""Dropout: masks agree where tensor ranks hold the same activations, and differ everywhere else."""

import hashlib
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from dist_llm.config.derive import AXES
from dist_llm.engines.native import NativeEngine
from dist_llm.train.step import train_step
from tests.laws.law import batches_of, config_of, merge_ranks, trace
from tests.laws.layouts import MODELS, SGD, Layout
from tests.laws.worlds import restart_world, world

DROPOUT = {"dropout": 0.5}

Places = dict[tuple[int, ...], dict[str, str]]  # mesh coordinates -> what each kind of mask was


def masks(config: Any) -> tuple[tuple[int, ...], dict[str, str]]:
    """This rank's coordinates and a digest of its residual mask, and of its stream inside attention."""
    engine, found = NativeEngine(config, torch.device("cpu")), {}

    def after_dropout(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        found.setdefault("residual", digest(output == 0))

    def in_attention(module: nn.Module, inputs: Any) -> None:
        found.setdefault("attention", digest(torch.get_rng_state()))

    for part in engine.model_parts:
        block = next(iter(part.blocks.values()))
        block.dropout.register_forward_hook(after_dropout)
        block.attention.kernel.register_forward_pre_hook(in_attention)
    train_step(engine, batches_of(config, engine, 0), 1.0, step=7)
    assert engine.mesh is not None
    return tuple(engine.mesh.get_local_rank(axis) for axis in AXES), found


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.to(torch.uint8).contiguous().numpy().tobytes()).hexdigest()[:16]


def run(layout: Layout) -> Places:
    config = config_of(
        layout.ranks,
        MODELS[layout.model] | DROPOUT,
        optim=SGD,
        parallel=layout.parallel,
        data={"micro_batch": layout.micro},
    )
    return dict(world(layout.ranks).run(masks, config))


def distinct(places: Places, kind: str) -> int:
    return len({found[kind] for found in places.values()})


@pytest.mark.parametrize(
    "parallel",
    [
        {"dp_replicate": 2},
        {"dp_shard": 2},
        {"cp": 2},
        {"tp": 2},
        {"dp_shard": 2, "tp": 2},
        {"dp_replicate": 2, "cp": 2},
    ],
    ids=str,
)
def test_ranks_with_other_activations_drop_others(parallel: dict[str, int]) -> None:
    ranks = 2 if len(parallel) == 1 else 4
    places = run(Layout(ranks, parallel))
    assert distinct(places, "residual") == distinct(places, "attention") == ranks


@pytest.mark.parametrize("bug", [False, True])
def test_microbatches_of_a_step_do_not_share_a_mask(bug: bool) -> None:
    """Two microbatches of the same rows: equal losses would mean equal masks."""
    engine = NativeEngine(config_of(1, DROPOUT, optim=SGD, data={"micro_batch": 12}), torch.device("cpu"))
    batch, seed = batches_of(engine.config, engine, 0)[0], engine._seed_dropout
    with patch.object(engine, "_seed_dropout", lambda step, _: seed(step, 0)) if bug else nullcontext():
        losses = engine.accumulate([batch, batch], torch.tensor(batch.num_valid_tokens), step=3)
    first, second = losses.chunk(2)
    assert torch.equal(first, second) == bug


def test_stages_do_not_share_a_seed() -> None:
    places = run(Layout(2, {"pp": 2}, micro=6))
    assert distinct(places, "residual") == distinct(places, "attention") == 2


@pytest.mark.parametrize("data", [{}, {"dp_shard": 2}], ids=["tp", "dp_shard x tp"])
def test_without_sequence_parallel_tensor_ranks_agree_on_residuals_and_not_on_heads(data: dict[str, int]) -> None:
    ranks = 4 if data else 2
    places = run(Layout(ranks, {"tp": 2, "sequence_parallel": False, **data}))
    assert distinct(places, "residual") == ranks // 2
    assert distinct(places, "attention") == ranks


@pytest.mark.parametrize(
    "layout",
    [
        Layout(2, {"tp": 2, "sequence_parallel": False}, "gpt", 8),
        Layout(2, {"tp": 2}, "tied", 8),
        Layout(4, {"dp_replicate": 2, "tp": 2}, "tied"),
        Layout(2, {"pp": 2}, "tied", 6),
        Layout(2, {"pp": 2, "pp_schedule": "zbv"}, "tied", 6),
    ],
    ids=str,
)
def test_replicated_and_tied_parameters_stay_bitwise_equal_for_ten_steps_of_dropout(layout: Layout) -> None:
    """`merge_ranks` compares what several ranks hold, bit for bit."""
    adamw = {"name": "adamw", "lr": 1e-3, "clip": 1.0}
    config = config_of(
        layout.ranks,
        MODELS[layout.model] | DROPOUT,
        optim=adamw,
        parallel=layout.parallel,
        data={"micro_batch": layout.micro},
    )
    found = merge_ranks(world(layout.ranks).run(trace, config, 10))
    assert all(torch.isfinite(value).all() for value in found.parameters[-1].values())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_repeats_the_masks(recompute: str, compiled: bool) -> None:
    """Same seeds, so the same step to the last bit, recomputed or not; with split heads too."""
    for parallel in ({"tp": 2, "sequence_parallel": False}, {"dp_shard": 2}):
        if compiled and recompute == "selective" and "tp" in parallel:
            continue  # refused
        found = []
        for choice in ("none", recompute):
            config = config_of(2, DROPOUT, optim=SGD, parallel={**parallel, "recompute": choice}, compile=compiled)
            if compiled:
                restart_world(2)
            found.append(merge_ranks(world(2).run(trace, config, 2)))
        assert found[0].losses == found[1].losses
        for name, gradient in found[0].gradients[0].items():
            assert torch.equal(gradient, found[1].gradients[0][name]), name
