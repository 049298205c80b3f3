"""Dropout masks are equal on tensor-parallel ranks with the same activations, and differ everywhere else."""

import hashlib
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from dist_llm.config.derive import AXES
from dist_llm.engines.native import NativeEngine
from dist_llm.training.step import train_step
from tests.laws.law import make_batches, make_config, make_layout_config, merge_ranks, record_trace
from tests.laws.layouts import SGD, Layout
from tests.laws.worlds import get_world, restart_world

DROPOUT = {"dropout": 0.5}

MaskDigests = dict[tuple[int, ...], dict[str, str]]  # mesh coordinates -> digest of each kind of mask


def compute_mask_digests(config: Any) -> tuple[tuple[int, ...], dict[str, str]]:
    """Take a step; return the mesh coordinates of this rank, and digests of its dropout randomness.

    The digests are those of the residual dropout mask, and of the RNG state before attention.
    """
    engine, digests = NativeEngine(config, torch.device("cpu")), {}

    def record_residual_mask(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        digests.setdefault("residual", compute_digest(output == 0))

    def record_attention_state(module: nn.Module, inputs: Any) -> None:
        digests.setdefault("attention", compute_digest(torch.get_rng_state()))

    for part in engine.model_parts:
        block = next(iter(part.blocks.values()))
        block.dropout.register_forward_hook(record_residual_mask)
        block.attention.kernel.register_forward_pre_hook(record_attention_state)
    train_step(engine, make_batches(config, engine, step=0), lr=1.0, step=7)
    assert engine.mesh is not None
    return tuple(engine.mesh.get_local_rank(axis) for axis in AXES), digests


def compute_digest(tensor: torch.Tensor) -> str:
    """Return a hash of the bits of a mask, or of the bytes of an RNG state."""
    return hashlib.sha256(tensor.to(torch.uint8).contiguous().numpy().tobytes()).hexdigest()[:16]


def run_step_with_dropout(layout: Layout) -> MaskDigests:
    """Take a step on all ranks of the layout; return the digests by mesh coordinates."""
    config = make_layout_config(layout, optim=SGD, model=DROPOUT)
    return dict(get_world(layout.ranks).run(compute_mask_digests, config))


def count_distinct(digests: MaskDigests, kind: str) -> int:
    """Return the number of different masks of a kind over the ranks."""
    return len({rank_digests[kind] for rank_digests in digests.values()})


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
def test_ranks_with_different_activations_have_different_masks(parallel: dict[str, int]) -> None:
    ranks = 2 if len(parallel) == 1 else 4
    digests = run_step_with_dropout(Layout(ranks=ranks, parallel=parallel))
    assert count_distinct(digests, "residual") == count_distinct(digests, "attention") == ranks


@pytest.mark.parametrize("bug", [False, True], ids=["correct", "microbatches share a seed"])
def test_microbatches_of_a_step_do_not_share_a_mask(bug: bool) -> None:
    """The two microbatches are equal, so their losses are equal only if their masks are."""
    engine = NativeEngine(make_config(ranks=1, model=DROPOUT, optim=SGD, data={"micro_batch": 12}), torch.device("cpu"))
    batch, seed_dropout = make_batches(engine.config, engine, step=0)[0], engine._seed_dropout
    with patch.object(engine, "_seed_dropout", lambda step, _: seed_dropout(step, 0)) if bug else nullcontext():
        losses = engine.accumulate([batch, batch], torch.tensor(batch.num_valid_tokens), step=3)
    first, second = losses.chunk(2)
    assert torch.equal(first, second) == bug


def test_stages_do_not_share_a_seed() -> None:
    digests = run_step_with_dropout(Layout(ranks=2, parallel={"pp": 2}, micro_batch=6))
    assert count_distinct(digests, "residual") == count_distinct(digests, "attention") == 2


@pytest.mark.parametrize("data", [{}, {"dp_shard": 2}], ids=["tp", "dp_shard x tp"])
def test_without_sequence_parallel_tensor_ranks_share_residual_masks_only(data: dict[str, int]) -> None:
    ranks = 4 if data else 2
    digests = run_step_with_dropout(Layout(ranks=ranks, parallel={"tp": 2, "sequence_parallel": False, **data}))
    assert count_distinct(digests, "residual") == ranks // 2
    assert count_distinct(digests, "attention") == ranks


@pytest.mark.parametrize(
    "layout",
    [
        Layout(ranks=2, parallel={"tp": 2, "sequence_parallel": False}, model="gpt", micro_batch=8),
        Layout(ranks=2, parallel={"tp": 2}, model="tied", micro_batch=8),
        Layout(ranks=4, parallel={"dp_replicate": 2, "tp": 2}, model="tied"),
        Layout(ranks=2, parallel={"pp": 2}, model="tied", micro_batch=6),
        Layout(ranks=2, parallel={"pp": 2, "pp_schedule": "zbv"}, model="tied", micro_batch=6),
    ],
    ids=str,
)
def test_copies_of_a_parameter_stay_bitwise_equal_with_dropout(layout: Layout) -> None:
    """After ten steps `merge_ranks` compares replicated and tied parameters bit for bit."""
    adamw = {"name": "adamw", "lr": 1e-3, "clip": 1.0}
    config = make_layout_config(layout, optim=adamw, model=DROPOUT)
    merged = merge_ranks(get_world(layout.ranks).run(record_trace, config, steps=10))
    assert all(torch.isfinite(value).all() for value in merged.parameters[-1].values())


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_repeats_the_masks(recompute: str, compiled: bool) -> None:
    """A step with recomputation is bitwise equal to one without, also with heads split over tensor-parallel ranks."""
    for parallel in ({"tp": 2, "sequence_parallel": False}, {"dp_shard": 2}):
        if compiled and recompute == "selective" and "tp" in parallel:
            continue  # the config rules refuse it
        traces = []
        for recompute_mode in ("none", recompute):
            config = make_config(
                ranks=2, model=DROPOUT, optim=SGD, parallel={**parallel, "recompute": recompute_mode}, compile=compiled
            )
            if compiled:
                restart_world(2)
            traces.append(merge_ranks(get_world(2).run(record_trace, config, steps=2)))
        assert traces[0].losses == traces[1].losses
        for name, gradient in traces[0].gradients[0].items():
            assert torch.equal(gradient, traces[1].gradients[0][name]), name
