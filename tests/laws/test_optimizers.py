"""Muon, bf16 moments and momentum: every layout computes the steps of one process."""

from functools import partial

import pytest
import torch
from torch import nn, optim
from torch.distributed.tensor import Shard, distribute_tensor

from dist_llm.config.parallel_section import ParallelConfig
from dist_llm.optim.muon import newton_schulz
from dist_llm.optim.sgd import LocalSGD
from dist_llm.parallel.distributed_muon import DistributedOrthogonalize
from dist_llm.parallel.mesh import build_mesh
from dist_llm.sharded import to_local
from tests.laws.law import assert_matches_one_process, make_config, merge_ranks, record_trace, reference
from tests.laws.layouts import BF16_MOMENTS, COMPILED_LAYOUTS, MODELS, MUON, Layout
from tests.laws.worlds import world

MORE_LAYOUTS = [
    Layout(2, {"dp_replicate": 2}),
    Layout(4, {"dp_replicate": 2, "dp_shard": 2}, "gpt"),
    Layout(2, {"tp": 2}, "t5"),
    Layout(2, {"pp": 2, "pp_schedule": "zbv"}, micro=6),
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*COMPILED_LAYOUTS.values(), *MORE_LAYOUTS], ids=str)
def test_muon_on_every_layout(layout: Layout) -> None:
    assert_matches_one_process(layout, MUON, steps=3)


def owners_match_full_matrices(dtype: torch.dtype) -> bool:
    """Whether shards that owner ranks orthogonalize equal those of the full matrices, bit for bit."""
    mesh = build_mesh(ParallelConfig(dp_shard=2), "cpu")
    generator = torch.Generator().manual_seed(0)
    full = [1e-9 * torch.randn(shape, generator=generator) for shape in ((6, 8), (9, 4), (6, 8))]
    shards = [distribute_tensor(matrix, mesh["dp_shard"], (Shard(0),), src_data_rank=None) for matrix in full]
    actual = DistributedOrthogonalize(mesh, shards, dtype)(shards)
    expected = (newton_schulz(matrix[None].to(dtype))[0] for matrix in full)
    return all(torch.equal(a.full_tensor(), b.float()) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_owner_ranks_orthogonalize_in_the_compute_dtype(dtype: torch.dtype) -> None:
    """With gradients as small as 1e-9 and with shards of unequal size."""
    assert world(2).run(owners_match_full_matrices, dtype) == [True, True]


@pytest.mark.parametrize("name", ["shards_orthogonalized_separately", "shards_returned_to_the_wrong_rank"])
def test_a_planted_bug_breaks_the_law_of_muon(name: str) -> None:
    with pytest.raises(AssertionError, match="off by"):
        assert_matches_one_process(Layout(2, {"dp_shard": 2}), MUON, steps=3, bug=name)


@pytest.mark.parametrize(
    "layout",
    [*(pytest.param(layout, marks=pytest.mark.slow) for layout in list(COMPILED_LAYOUTS.values())[::2]), *MORE_LAYOUTS],
    ids=str,
)
def test_moments_in_bf16_on_every_layout(layout: Layout) -> None:
    """Rounding depends on the element alone, so only the few weights differ whose fp32 moments round differently."""
    assert fraction_of_different_weights(layout) < 0.01


SGD_WITH_MOMENTUM = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "clip": 0.05}


@pytest.mark.parametrize("layout", list(COMPILED_LAYOUTS.values())[::3], ids=str)
def test_momentum_on_layouts(layout: Layout) -> None:
    assert_matches_one_process(layout, SGD_WITH_MOMENTUM, steps=4)


@pytest.mark.parametrize("name", ["momentum_is_reset_before_each_step", "momentum_is_kept_on_the_first_rank_only"])
def test_a_planted_bug_breaks_the_law_of_momentum(name: str) -> None:
    with pytest.raises(AssertionError, match="off by"):
        assert_matches_one_process(Layout(2, {"dp_shard": 2}), SGD_WITH_MOMENTUM, steps=4, bug=name)


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
            for number, parameter in enumerate(parameters[:2]):
                parameter.grad = torch.full_like(parameter, step + number + 0.3)
            optimizer.step()
        results.append(parameters)
    for local_value, torch_value, initial_value in zip(*results, initial, strict=True):
        assert torch.equal(local_value, torch_value)
        assert torch.equal(local_value, initial_value) == (initial_value is initial[2])


def test_moments_rounded_by_the_local_index_break_the_law() -> None:
    assert fraction_of_different_weights(Layout(2, {"dp_shard": 2}), "moments_rounded_by_the_local_index") > 0.1


def fraction_of_different_weights(layout: Layout, bug: str | None = None) -> float:
    """Return the fraction of weights that are more than 1e-5 off after five steps.

    None may be off by more than rounding.
    """
    micro, parallel = {"micro_batch": layout.micro}, layout.parallel
    config = make_config(layout.ranks, MODELS[layout.model], optim=BF16_MOMENTS, parallel=parallel, data=micro)
    actual_trace, expected_trace = (
        merge_ranks(world(layout.ranks).run(record_trace, config, 5, bug)),
        reference(config, 5),
    )
    count = off = 0
    for name, expected in expected_trace.parameters[-1].items():
        # The gradient of a key bias without RoPE is rounding only, and the bias stays near zero.
        difference = (actual_trace.parameters[-1][name] - expected).abs() / expected.abs().max().clamp(min=1e-4)
        assert difference.max() < 2e-3, f"{name}: off by {difference.max():.1e}"
        off += int((difference > 1e-5).sum())
        count += expected.numel()
    return off / count
