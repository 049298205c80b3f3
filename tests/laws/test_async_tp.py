"""Asynchronous tensor parallelism computes the same step as one process.

Its fused kernels need GPUs. On a CPU, torch's fallback definitions replace them, so the tests cover the compiler's
work: which matrix products it fuses with which collectives.
"""

from collections import Counter
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.distributed import _symmetric_memory as symmetric_memory

from dist_llm.config.schema import Config
from dist_llm.parallel import parallelize
from dist_llm.parallel.async_tp import enable_fused_collectives
from tests.laws.law import RankTrace, assert_traces_match, make_config, merge_ranks, record_trace, trace_one_process
from tests.laws.layouts import SGD
from tests.laws.worlds import get_world, restart_world

FALLBACK_OF_FUSED_OP = {
    "fused_all_gather_matmul": symmetric_memory._fused_all_gather_matmul_fallback,
    "fused_matmul_reduce_scatter": symmetric_memory._fused_matmul_reduce_scatter_fallback,
}


class FusedOpCounter(CustomGraphPass):
    """Counts the fused operations of each graph after the compiler has inserted them."""

    def __init__(self) -> None:
        self.names: Counter[str] = Counter()

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.names.update(str(node.target).split(".")[1] for node in graph.nodes if "symm_mem" in str(node.target))

    def uuid(self) -> Any:
        return None  # disables the cache, so that the pass sees every graph


class FusedTrace(NamedTuple):
    """The trace of some steps, and how often the compiler inserted each fused operation."""

    rank_trace: RankTrace
    op_counts: dict[str, int]


def trace_fused_steps(config: Config, reverse_shards: bool) -> FusedTrace:
    """Take two steps with fused collectives.

    `reverse_shards` plants a bug: the outputs have the shards of the ranks in reverse order.
    """
    counter, library = FusedOpCounter(), torch.library.Library("symm_mem", "IMPL")
    planted = {"fused_all_gather_matmul": _gather_reversed} if reverse_shards else {}
    for name, function in (FALLBACK_OF_FUSED_OP | planted).items():
        library.impl(name, function, "CPU")
    with (
        # enable_async_tp does nothing on a CPU, so the function that it calls on a GPU takes its place.
        patch.object(parallelize, "enable_async_tp", enable_fused_collectives),
        patch.object(inductor_config, "post_grad_custom_post_pass", counter),
        # enable_fused_collectives sets these two for all later compilations. `patch.object` restores them.
        patch.object(inductor_config, "_micro_pipeline_tp", False),
        patch.object(inductor_config, "post_grad_custom_pre_pass", None),
        patch.object(torch.distributed, "is_nccl_available", lambda: True),  # the compiler checks it on any device
    ):
        rank_trace = record_trace(config, steps=2)
    library._destroy()
    return FusedTrace(rank_trace, dict(counter.names))


def _gather_reversed(shard: torch.Tensor, weights: list[torch.Tensor], dim: int, group: str, **kwargs: Any) -> Any:
    """Planted bug: the outputs have the shards of the ranks in reverse order."""
    full, outputs = FALLBACK_OF_FUSED_OP["fused_all_gather_matmul"](shard, weights, dim, group, **kwargs)
    num_shards = outputs[0].shape[dim] // shard.shape[dim]
    return full, [torch.cat(output.chunk(num_shards, dim)[::-1], dim) for output in outputs]


@pytest.mark.parametrize("recompute", ["none", pytest.param("selective", marks=pytest.mark.slow)])
def test_fused_collectives_compute_the_step_of_one_process(recompute: str) -> None:
    parallel = {"tp": 2, "async_tp": True, "recompute": recompute}
    config = make_config(ranks=2, optim=SGD, compile=True, parallel=parallel)
    restart_world(2)
    traces, counts = zip(*get_world(2).run(trace_fused_steps, config, reverse_shards=False), strict=True)
    assert counts[0] == counts[1], "all ranks must fuse the same operations"
    # The blocks share their compiled graphs, which have at least these fused operations. Forward: two all-gathers,
    # before the products with q, k, v and with gate, up; two reduce-scatters, after the products with the output
    # projection and with down. Backward: the gradients of these two reduce-scatters are all-gathers, each before the
    # product with the same weight.
    assert counts[0]["fused_all_gather_matmul"] >= 4
    assert counts[0]["fused_matmul_reduce_scatter"] >= 2
    assert_traces_match(merge_ranks(traces), trace_one_process(config, steps=2))


def test_reversed_shards_change_the_step() -> None:
    config = make_config(ranks=2, optim=SGD, compile=True, parallel={"tp": 2, "async_tp": True})
    restart_world(2)
    results = get_world(2).run(trace_fused_steps, config, reverse_shards=True)
    traces = [result.rank_trace for result in results]
    with pytest.raises(AssertionError, match="off by"):
        assert_traces_match(merge_ranks(traces), trace_one_process(config, steps=2))
