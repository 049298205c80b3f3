"""Every layout computes the optimizer steps of one process with Muon, bf16 moments and SGD with momentum."""

from functools import partial

import pytest
import torch
from torch import nn, optim
from torch.distributed.tensor import Shard, distribute_tensor

from dist_llm.config.parallel_section import ParallelConfig
from dist_llm.optim.muon import newton_schulz
from dist_llm.optim.sgd import LocalSGD
from dist_llm.parallel.distributed_muon import DistributedOrthogonalizer
from dist_llm.parallel.mesh import build_mesh
from dist_llm.sharded import to_local
from tests.laws.law import (
    assert_matches_one_process,
    make_layout_config,
    merge_ranks,
    record_trace,
    trace_one_process,
)
from tests.laws.layouts import BF16_MOMENTS, COMPILED_LAYOUTS, MUON, Layout
from tests.laws.worlds import get_world

MORE_LAYOUTS = [
    Layout(ranks=2, parallel={"dp_replicate": 2}),
    Layout(ranks=4, parallel={"dp_replicate": 2, "dp_shard": 2}, model="gpt"),
    Layout(ranks=2, parallel={"tp": 2}, model="t5"),
    Layout(ranks=2, parallel={"pp": 2, "pp_schedule": "zbv"}, micro_batch=6),
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*COMPILED_LAYOUTS.values(), *MORE_LAYOUTS], ids=str)
def test_a_layout_computes_the_muon_steps_of_one_process(layout: Layout) -> None:
    assert_matches_one_process(layout, optim=MUON, steps=3)


def is_orthogonalization_exact(dtype: torch.dtype) -> bool:
    """Return whether distributed orthogonalization of shards equals that of full matrices, bit for bit.

    The owner of a matrix is the rank that gathers and orthogonalizes it.
    """
    mesh = build_mesh(ParallelConfig(dp_shard=2), "cpu")
    generator = torch.Generator().manual_seed(0)
    matrices = [1e-9 * torch.randn(shape, generator=generator) for shape in ((6, 8), (9, 4), (6, 8))]
    shards = [distribute_tensor(matrix, mesh["dp_shard"], (Shard(0),), src_data_rank=None) for matrix in matrices]
    results = DistributedOrthogonalizer(mesh, shards, dtype)(shards)
    references = (newton_schulz(matrix[None].to(dtype))[0] for matrix in matrices)
    return all(
        torch.equal(result.full_tensor(), expected.float())
        for result, expected in zip(results, references, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_owner_ranks_orthogonalize_in_the_compute_dtype(dtype: torch.dtype) -> None:
    """The gradients are as small as 1e-9, and the shards have unequal sizes."""
    assert get_world(2).run(is_orthogonalization_exact, dtype) == [True, True]


@pytest.mark.parametrize("name", ["shards_are_orthogonalized_separately", "shards_are_returned_to_the_wrong_rank"])
def test_a_planted_bug_in_muon_is_detected(name: str) -> None:
    with pytest.raises(AssertionError, match="off by"):
        assert_matches_one_process(Layout(ranks=2, parallel={"dp_shard": 2}), optim=MUON, steps=3, bug=name)


@pytest.mark.parametrize(
    "layout",
    [*(pytest.param(layout, marks=pytest.mark.slow) for layout in list(COMPILED_LAYOUTS.values())[::2]), *MORE_LAYOUTS],
    ids=str,
)
def test_a_layout_rounds_moments_to_bf16_as_one_process(layout: Layout) -> None:
    """Rounding depends only on the index of an element, so few weights differ: where fp32 moments differ slightly."""
    assert measure_fraction_of_different_weights(layout) < 0.01


SGD_WITH_MOMENTUM = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "clip": 0.05}


@pytest.mark.parametrize("layout", list(COMPILED_LAYOUTS.values())[::3], ids=str)
def test_a_layout_computes_the_momentum_steps_of_one_process(layout: Layout) -> None:
    assert_matches_one_process(layout, optim=SGD_WITH_MOMENTUM, steps=4)


@pytest.mark.parametrize("name", ["momentum_is_reset_before_each_step", "momentum_is_kept_on_the_first_rank_only"])
def test_a_planted_bug_in_the_momentum_is_detected(name: str) -> None:
    with pytest.raises(AssertionError, match="off by"):
        assert_matches_one_process(
            Layout(ranks=2, parallel={"dp_shard": 2}), optim=SGD_WITH_MOMENTUM, steps=4, bug=name
        )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_local_sgd_equals_torch_sgd_on_local_tensors(momentum: float) -> None:
    """LocalSGD equals torch's SGD bit for bit; a parameter without a gradient does not change."""
    generator = torch.Generator().manual_seed(0)
    initial = [torch.randn(3, 4, generator=generator) for _ in range(3)]
    results = []
    for build_optimizer in (partial(LocalSGD, to_local=to_local), partial(optim.SGD, foreach=True)):
        parameters = [nn.Parameter(value.clone()) for value in initial]
        optimizer = build_optimizer([{"params": parameters, "weight_decay": 0.1}], lr=0.1, momentum=momentum)
        for step in range(3):
            for index, parameter in enumerate(parameters[:2]):
                parameter.grad = torch.full_like(parameter, step + index + 0.3)
            optimizer.step()
        results.append(parameters)
    for local_value, torch_value, initial_value in zip(*results, initial, strict=True):
        assert torch.equal(local_value, torch_value)
        assert torch.equal(local_value, initial_value) == (initial_value is initial[2])


def test_stochastic_rounding_by_the_local_index_is_detected() -> None:
    assert (
        measure_fraction_of_different_weights(
            Layout(ranks=2, parallel={"dp_shard": 2}), "stochastic_rounding_depends_on_the_local_index"
        )
        > 0.1
    )


def measure_fraction_of_different_weights(layout: Layout, bug: str | None = None) -> float:
    """Return the fraction of weights that differ from one process by more than 1e-5 (relative) after five steps.

    Raises AssertionError if a weight differs by more than 2e-3.
    """
    config = make_layout_config(layout, optim=BF16_MOMENTS)
    actual_trace = merge_ranks(get_world(layout.ranks).run(record_trace, config, steps=5, bug=bug))
    expected_trace = trace_one_process(config, steps=5)
    num_weights = num_different = 0
    for name, expected in expected_trace.parameters[-1].items():
        # The gradient of a key bias without RoPE consists of rounding errors, and the bias stays near zero.
        difference = (actual_trace.parameters[-1][name] - expected).abs() / expected.abs().max().clamp(min=1e-4)
        assert difference.max() < 2e-3, f"{name}: off by {difference.max():.1e}"
        num_different += int((difference > 1e-5).sum())
        num_weights += expected.numel()
    return num_different / num_weights
