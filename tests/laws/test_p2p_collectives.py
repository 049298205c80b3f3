"""The point-to-point messages that replace collectives on CPUs compute the same step and send no more bytes."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.communication import Case, count_traffic, make_case, select_busiest_rank
from dist_llm.config.schema import Config
from dist_llm.engines.native import NativeEngine
from dist_llm.parallel import mesh, p2p_collectives
from dist_llm.training.step import train_step
from tests.laws.law import (
    RankTrace,
    assert_traces_match,
    copy_full_tensor,
    make_batches,
    make_config,
    make_layout_config,
    merge_ranks,
    record_trace,
    trace_one_process,
)
from tests.laws.layouts import ADAMW, MODELS, Layout, index_by_name
from tests.laws.worlds import get_world, restart_world

LAYOUTS = index_by_name(
    Layout(ranks=2, parallel={"dp_shard": 2}),
    Layout(ranks=4, parallel={"dp_shard": 4}, model="tied", micro_batch=3),
    Layout(ranks=4, parallel={"dp_shard": 4, "reshard": "always"}, model="bert", micro_batch=3),
    Layout(
        ranks=4, parallel={"dp_replicate": 2, "dp_shard": 2, "reduce_each_microbatch": True}, model="gpt", micro_batch=3
    ),
    Layout(ranks=4, parallel={"dp_shard": 2, "cp": 2, "recompute": "full"}),
    Layout(ranks=2, parallel={"cp": 2}, model="olmo"),  # halo exchanges of windows besides messages
    Layout(ranks=2, parallel={"tp": 2}, model="bounded", micro_batch=3),
    Layout(ranks=2, parallel={"tp": 2, "sequence_parallel": False}, model="gpt", micro_batch=3),
    Layout(ranks=4, parallel={"dp_shard": 2, "tp": 2, "recompute": "selective"}, model="t5"),
    Layout(ranks=4, parallel={"pp": 2, "dp_shard": 2, "pp_schedule": "interleaved_1f1b"}, micro_batch=3),
)


class ReduceScatterWithoutSum(p2p_collectives.P2PReduceScatter):
    """Planted bug: a rank does not add the contributions of other ranks."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, *args: Any, **kwargs: Any
    ) -> None:
        super().__call__(output_tensor, input_tensor, group, *args, **kwargs)
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])


class AllGatherWithSwappedShards(p2p_collectives.P2PAllGather):
    """Planted bug: the shards of the first two ranks are swapped."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, **kwargs: Any
    ) -> dist.Work:
        work = super().__call__(output_tensor, input_tensor, group, **kwargs)
        work.wait()
        first, second, *_ = output_tensor.chunk(group.size())
        first_shard = first.clone()
        first.copy_(second)
        second.copy_(first_shard)
        return work


def use_messages() -> AbstractContextManager[Any]:
    """Use point-to-point messages, as training on CPUs does. The test worlds switch them off by default (worlds.py)."""
    return patch.object(p2p_collectives, "uses_p2p", lambda device: device == "cpu")


def trace_with_messages(config: Config, bug: tuple[str, type] | None) -> RankTrace:
    """Record a trace with point-to-point collectives. `bug` is (class name, replacement)."""
    with use_messages(), patch.object(p2p_collectives, *bug) if bug else nullcontext():
        return record_trace(config, steps=3)


class TrainedModel(NamedTuple):
    """What three steps computed."""

    losses: list[float]  # of each step, and of the evaluation after it
    weights: dict[str, Tensor]


def train_and_evaluate(config: Config, messages: bool) -> TrainedModel:
    """Take three steps, each followed by an evaluation. With `messages`, collectives are point-to-point messages."""
    with use_messages() if messages else nullcontext():
        engine, losses = NativeEngine(config, torch.device("cpu")), []
    for step in range(3):
        batches = make_batches(config, engine, step)
        losses.append(train_step(engine, batches, config.optim.lr, step).loss.item())
        losses.append(engine.score(engine.to_local_batch(batches[0])).sum().item())
    return TrainedModel(losses, {name: copy_full_tensor(parameter) for name, parameter in engine.named_parameters()})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_messages_of_two_ranks_are_bitwise_equal_to_collectives(precision: str) -> None:
    """A sum of two numbers has only one order, and weights gathered in bf16 are not summed."""
    config = make_config(ranks=2, optim=ADAMW, parallel={"dp_shard": 2}, precision=precision, data={"micro_batch": 6})
    collectives, messages = (
        get_world(2).run(train_and_evaluate, config, messages=uses_messages)[0] for uses_messages in (False, True)
    )
    assert messages.losses == collectives.losses
    assert all(torch.equal(messages.weights[name], weight) for name, weight in collectives.weights.items())


def assert_messages_match_one_process(layout: Layout, bug: tuple[str, type] | None = None) -> None:
    """Raise AssertionError unless the layout computes the steps of one process with messages."""
    config = make_layout_config(layout, optim=ADAMW)
    assert_traces_match(
        merge_ranks(get_world(layout.ranks).run(trace_with_messages, config, bug)), trace_one_process(config, steps=3)
    )


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_messages_compute_the_step_of_one_process(layout: Layout) -> None:
    assert_messages_match_one_process(layout)


@pytest.mark.parametrize(
    "bug",
    [("P2PReduceScatter", ReduceScatterWithoutSum), ("P2PAllGather", AllGatherWithSwappedShards)],
    ids=["unadded", "swapped"],
)
def test_a_planted_bug_is_detected(bug: tuple[str, type]) -> None:
    with pytest.raises(AssertionError, match="off by"):
        assert_messages_match_one_process(LAYOUTS["dp_shard4_micro3_tied"], bug)


class ModuleWithBug:
    """`p2p_collectives` with a planted bug for collectives of activations; FSDP uses the original module."""

    def __init__(self, name: str, replacement: type) -> None:
        setattr(self, name, replacement)

    def __getattr__(self, name: str) -> Any:
        return getattr(p2p_collectives, name)


def trace_with_broken_activations(config: Config, bug: tuple[str, type]) -> RankTrace:
    """Record a trace in which only the collectives of activations have the bug."""
    with use_messages(), patch.object(mesh, "p2p_collectives", ModuleWithBug(*bug)):
        return record_trace(config, steps=3)


@pytest.mark.parametrize("parallel", [{"cp": 2}, {"tp": 2}], ids=str)
@pytest.mark.parametrize(
    "bug",
    [("P2PReduceScatter", ReduceScatterWithoutSum), ("P2PAllGather", AllGatherWithSwappedShards)],
    ids=["unadded", "swapped"],
)
def test_a_planted_bug_in_messages_of_activations_is_detected(bug: tuple[str, type], parallel: dict[str, Any]) -> None:
    config = make_config(ranks=2, optim=ADAMW, parallel=parallel)
    traces = get_world(2).run(trace_with_broken_activations, config, bug)
    with pytest.raises(AssertionError, match="off by"):
        assert_traces_match(merge_ranks(traces), trace_one_process(config, steps=3))


@pytest.mark.slow
def test_compiled_blocks_match_one_process() -> None:
    """Compiled blocks call the collectives of gloo, and the rest of the step sends messages on the same groups."""
    config = make_config(ranks=4, model=MODELS["tied"], optim=ADAMW, parallel={"dp_shard": 2, "tp": 2}, compile=True)
    restart_world(4)
    assert_traces_match(merge_ranks(get_world(4).run(trace_with_messages, config)), trace_one_process(config, steps=3))


def count_p2p_traffic(case: Case) -> dict[str, Any]:
    """Count the traffic of a case with point-to-point collectives."""
    with use_messages():
        return count_traffic(case)


@pytest.mark.parametrize(
    "case",
    [
        make_case(dp_shard=2),
        make_case(dp_shard=4),
        make_case(cp=2),
        make_case(tp=2),
        make_case(tp=2, sequence_parallel=False),
    ],
    ids=lambda case: case.name,
)
def test_a_rank_sends_as_many_bytes_as_with_collectives(case: Case) -> None:
    """Bytes of collectives are counted as a ring algorithm sends them, messages as they are sent."""
    collective_traffic, p2p_traffic = (
        select_busiest_rank(get_world(case.ranks).run(count_function, case))
        for count_function in (count_traffic, count_p2p_traffic)
    )
    assert p2p_traffic["bytes"] == collective_traffic["bytes"]
    kinds = {entry["kind"] for entry in p2p_traffic["by_axis"]}
    assert kinds == {"send", "all-reduce"}, "only sends, and all-reduces of norms and token counts, may occur"


def test_sums_are_deterministic() -> None:
    """The result is equal bit for bit in two runs, for numbers whose sum depends on the order."""
    first, second = (get_world(4).run(reduce_scatter_numbers) for _ in range(2))
    assert all(torch.equal(first_shard, second_shard) for first_shard, second_shard in zip(first, second, strict=True))
    total = torch.stack([make_numbers(rank) for rank in range(4)]).double().sum(0)
    torch.testing.assert_close(torch.cat(first).double(), total, rtol=0, atol=1e-6 * float(total.abs().max()))


def make_numbers(rank: int) -> Tensor:
    """Return random numbers whose magnitude depends on the rank, so that the order of a sum matters."""
    return torch.randn(4000, generator=torch.Generator().manual_seed(rank)) * 10.0**rank


def reduce_scatter_numbers() -> Tensor:
    """Reduce-scatter the numbers of all ranks; return the result of this rank."""
    output = torch.empty(1000)
    assert dist.group.WORLD is not None
    p2p_collectives.P2PReduceScatter()(output, make_numbers(dist.get_rank()), dist.group.WORLD, dist.ReduceOp.SUM)
    return output
