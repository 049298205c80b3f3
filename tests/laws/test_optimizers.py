"""Muon, moments in bf16, momentum: every layout takes the steps of one process."""

from functools import partial

import pytest
import torch
from torch import nn, optim
from torch.distributed.tensor import Shard, distribute_tensor

from dist_llm.config.schema import ParallelConfig
from dist_llm.optim.muon import newton_schulz
from dist_llm.optim.sgd import LocalSGD
from dist_llm.parallel.distributed_muon import DistributedOrthogonalize
from dist_llm.parallel.mesh import build_mesh
from dist_llm.sharded import to_local
from tests.laws.law import assert_matches_one_process, config_of, merge_ranks, reference, trace
from tests.laws.layouts import BF16_MOMENTS, CHOSEN, MODELS, MUON, Layout
from tests.laws.worlds import world

MORE = [
    Layout(2, {"dp_replicate": 2}),
    Layout(4, {"dp_replicate": 2, "dp_shard": 2}, "gpt"),
    Layout(2, {"tp": 2}, "t5"),
    Layout(2, {"pp": 2, "pp_schedule": "zbv"}, micro=6),
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [*CHOSEN, *MORE], ids=str)
def test_muon_on_every_layout(layout: Layout) -> None:
    assert_matches_one_process(layout, MUON, steps=3)


def owned(dtype: torch.dtype) -> bool:
    """Whether shards that owners made orthogonal are those of the whole, bit for bit."""
    mesh = build_mesh(ParallelConfig(dp_shard=2), "cpu")
    generator = torch.Generator().manual_seed(0)
    whole = [1e-9 * torch.randn(shape, generator=generator) for shape in ((6, 8), (9, 4), (6, 8))]
    shards = [distribute_tensor(each, mesh["dp_shard"], (Shard(0),), src_data_rank=None) for each in whole]
    got = DistributedOrthogonalize(mesh, shards, dtype)(shards)
    want = (newton_schulz(each[None].to(dtype))[0] for each in whole)
    return all(torch.equal(a.full_tensor(), b.float()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_owners_work_in_the_compute_type(dtype: torch.dtype) -> None:
    """Of gradients as small as a billionth, and with shards of unequal size."""
    assert world(2).run(owned, dtype) == [True, True]


@pytest.mark.parametrize("name", ["shards_orthogonalized_separately", "shards_returned_to_the_wrong_rank"])
def test_a_planted_bug_breaks_the_law_of_muon(name: str) -> None:
    with pytest.raises(AssertionError, match="off by"):
        assert_matches_one_process(Layout(2, {"dp_shard": 2}), MUON, steps=3, bug=name)


@pytest.mark.parametrize(
    "layout", [*(pytest.param(layout, marks=pytest.mark.slow) for layout in CHOSEN[::2]), *MORE], ids=str
)
def test_moments_in_bf16_on_every_layout(layout: Layout) -> None:
    """Their rounding is the element's own, so those few alone differ whose fp32 values lie on two sides of a chance."""
    assert differing(layout) < 0.01


SGD_WITH_MOMENTUM = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "clip": 0.05}


@pytest.mark.parametrize("layout", CHOSEN[::3], ids=str)
def test_momentum_on_layouts(layout: Layout) -> None:
    assert_matches_one_process(layout, SGD_WITH_MOMENTUM, steps=4)


@pytest.mark.parametrize("name", ["momentum_begins_anew_with_each_step", "momentum_is_the_first_ranks_alone"])
def test_a_planted_bug_breaks_the_law_of_momentum(name: str) -> None:
    with pytest.raises(AssertionError, match="off by"):
        assert_matches_one_process(Layout(2, {"dp_shard": 2}), SGD_WITH_MOMENTUM, steps=4, bug=name)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_torchs_on_what_a_rank_has(momentum: float) -> None:
    """Bit for bit; a parameter without a gradient stays."""
    generator = torch.Generator().manual_seed(0)
    begin = [torch.randn(3, 4, generator=generator) for _ in range(3)]
    found = []
    for kind in (partial(LocalSGD, to_local=to_local), partial(optim.SGD, foreach=True)):
        parameters = [nn.Parameter(each.clone()) for each in begin]
        optimizer = kind([{"params": parameters, "weight_decay": 0.1}], lr=0.1, momentum=momentum)
        for step in range(3):
            for number, parameter in enumerate(parameters[:2]):
                parameter.grad = torch.full_like(parameter, step + number + 0.3)
            optimizer.step()
        found.append(parameters)
    for ours, theirs, before in zip(*found, begin, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, before) == (before is begin[2])


def test_moments_rounded_by_the_place_in_the_share_break_the_law() -> None:
    assert differing(Layout(2, {"dp_shard": 2}), "moments_rounded_by_the_local_index") > 0.1


def differing(layout: Layout, bug: str | None = None) -> float:
    """The share of weights that are more than 1e-5 off after five steps; none may be off by more than rounding can."""
    micro, parallel = {"micro_batch": layout.micro}, layout.parallel
    config = config_of(layout.ranks, MODELS[layout.model], optim=BF16_MOMENTS, parallel=parallel, data=micro)
    got, want = merge_ranks(world(layout.ranks).run(trace, config, 5, bug)), reference(config, 5)
    count = off = 0
    for name, wanted in want.parameters[-1].items():
        # A key's bias without rope has no gradient but rounding, and stays near its zero.
        away = (got.parameters[-1][name] - wanted).abs() / wanted.abs().max().clamp(min=1e-4)
        assert away.max() < 2e-3, f"{name}: off by {away.max():.1e}"
        off += int((away > 1e-5).sum())
        count += wanted.numel()
    return off / count
