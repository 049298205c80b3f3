"""On CPUs gathers and reductions are messages: the step is that of one process, and no more is sent."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.communication import Case, busiest, case, count
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.parallel import mesh, p2p_collectives
from dist_llm.train.step import train_step
from tests.laws.law import RankTrace, batches_of, compare, config_of, full_tensor, merge_ranks, reference, trace
from tests.laws.layouts import ADAMW, MODELS, Layout
from tests.laws.worlds import restart_world, world

LAYOUTS = [
    Layout(2, {"dp_shard": 2}),
    Layout(4, {"dp_shard": 4}, "tied", micro=3),
    Layout(4, {"dp_shard": 4, "reshard": "always"}, "bert", micro=3),
    Layout(4, {"dp_replicate": 2, "dp_shard": 2, "reduce_each_microbatch": True}, "gpt", micro=3),
    Layout(4, {"dp_shard": 2, "cp": 2, "recompute": "full"}),
    Layout(2, {"tp": 2}, "bounded", micro=3),
    Layout(2, {"tp": 2, "sequence_parallel": False}, "gpt", micro=3),
    Layout(4, {"dp_shard": 2, "tp": 2, "recompute": "selective"}, "t5"),
    Layout(4, {"pp": 2, "dp_shard": 2, "pp_schedule": "interleaved_1f1b"}, micro=3),
]


class Unadded(p2p_collectives.P2PReduceScatter):
    """A planted bug: the others' parts are received, and forgotten."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, *rest: Any, **named: Any
    ) -> None:
        super().__call__(output_tensor, input_tensor, group, *rest, **named)
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])


class Swapped(p2p_collectives.P2PAllGather):
    """A planted bug: the first two ranks' parts change places."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, **named: Any
    ) -> dist.Work:
        work = super().__call__(output_tensor, input_tensor, group, **named)
        work.wait()
        first, second, *_ = output_tensor.chunk(group.size())
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)
        return work


def by_messages() -> AbstractContextManager[Any]:
    """As on CPUs; the worlds here use collectives."""
    return patch.object(p2p_collectives, "uses_p2p", lambda device: device == "cpu")


def directly(config: Config, bug: tuple[str, type] | None) -> RankTrace:
    name, other = bug or ("P2PAllGather", p2p_collectives.P2PAllGather)
    with by_messages(), patch.object(p2p_collectives, name, other):
        return trace(config, 3)


def scored(config: Config, messages: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of steps with a score between them, which goes forward alone; and the weights after."""
    with by_messages() if messages else nullcontext():
        engine, losses = NativeEngine(config, torch.device("cpu")), []
    for step in range(3):
        batches = batches_of(config, engine, step)
        losses.append(train_step(engine, batches, config.optim.lr, step).loss.item())
        losses.append(engine.score(engine.to_local_batch(batches[0])).sum().item())
    return losses, {name: full_tensor(parameter) for name, parameter in engine.named_parameters()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_ranks_get_the_bits_that_collectives_give(precision: str) -> None:
    """A sum of two numbers has one order; weights gathered in bf16 are what they are."""
    config = config_of(2, {}, optim=ADAMW, parallel={"dp_shard": 2}, precision=precision, data={"micro_batch": 6})
    (losses, weights), (again, same) = (world(2).run(scored, config, each)[0] for each in (False, True))
    assert losses == again
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def hold(layout: Layout, bug: tuple[str, type] | None = None) -> None:
    data = {"micro_batch": layout.micro}
    config = config_of(layout.ranks, MODELS[layout.model], optim=ADAMW, parallel=layout.parallel, data=data)
    compare(merge_ranks(world(layout.ranks).run(directly, config, bug)), reference(config, 3))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_messages_take_the_step_of_one_process(layout: Layout) -> None:
    hold(layout)


@pytest.mark.parametrize("bug", [("P2PReduceScatter", Unadded), ("P2PAllGather", Swapped)], ids=["unadded", "swapped"])
def test_a_planted_bug_breaks_it(bug: tuple[str, type]) -> None:
    with pytest.raises(AssertionError, match="off by"):
        hold(LAYOUTS[1], bug)


class Broken:
    """`direct` with a bug, as those that exchange activations see it, while FSDP sees it without."""

    def __init__(self, name: str, other: type) -> None:
        setattr(self, name, other)

    def __getattr__(self, name: str) -> Any:
        return getattr(p2p_collectives, name)


def with_broken_activations(config: Config, bug: tuple[str, type]) -> RankTrace:
    with by_messages(), patch.object(mesh, "p2p_collectives", Broken(*bug)):
        return trace(config, 3)


@pytest.mark.parametrize("parallel", [{"cp": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize("bug", [("P2PReduceScatter", Unadded), ("P2PAllGather", Swapped)], ids=["unadded", "swapped"])
def test_a_bug_planted_in_messages_of_activations_breaks_it(bug: tuple[str, type], parallel: dict[str, Any]) -> None:
    config = config_of(2, {}, optim=ADAMW, parallel=parallel)
    traces = world(2).run(with_broken_activations, config, bug)
    with pytest.raises(AssertionError, match="off by"):
        compare(merge_ranks(traces), reference(config, 3))


@pytest.mark.slow
def test_compiled_blocks_use_collectives_beside_them() -> None:
    """On the same groups."""
    config = config_of(4, MODELS["tied"], optim=ADAMW, parallel={"dp_shard": 2, "tp": 2}, compile=True)
    restart_world(4)
    compare(merge_ranks(world(4).run(directly, config, None)), reference(config, 3))


def counted(chosen: Case) -> dict[str, Any]:
    with by_messages():
        return count(chosen)


@pytest.mark.parametrize(
    "chosen",
    [case(dp_shard=2), case(dp_shard=4), case(cp=2), case(tp=2), case(tp=2, sequence_parallel=False)],
    ids=lambda chosen: chosen.name,
)
def test_a_rank_sends_no_more_than_by_collectives(chosen: Case) -> None:
    """A law of bytes: collectives as a ring sends them, messages as they are."""
    collectives, messages = (busiest(world(chosen.ranks).run(each, chosen)) for each in (count, counted))
    assert messages["bytes"] == collectives["bytes"]
    kinds = {part["kind"] for part in messages["by_axis"]}
    assert kinds == {"send", "all-reduce"}  # the latter of the norm, and of counts


def test_its_sums_are_always_the_same() -> None:
    """Bit by bit, of numbers whose sum depends on the order."""
    first, second = (world(4).run(summed) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    whole = torch.stack([_numbers(rank) for rank in range(4)]).double().sum(0)
    torch.testing.assert_close(torch.cat(first).double(), whole, rtol=0, atol=1e-6 * float(whole.abs().max()))


def _numbers(rank: int) -> Tensor:
    return torch.randn(4000, generator=torch.Generator().manual_seed(rank)) * 10.0**rank


def summed() -> Tensor:
    output = torch.empty(1000)
    assert dist.group.WORLD is not None
    p2p_collectives.P2PReduceScatter()(output, _numbers(dist.get_rank()), dist.group.WORLD, dist.ReduceOp.SUM)
    return output
