"""Asynchronous tensor parallelism computes the same step. Its kernels need GPUs; on a CPU torch's own definition of
each stands in, so that what is held is the compiler's work: which products it fuses, and what it makes of them.
"""

from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._inductor import config as inductor
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.distributed import _symmetric_memory as symmetric

from dist_llm.config.schema import Config
from dist_llm.parallel import parallelize
from dist_llm.parallel.async_tp import enable_fused_collectives
from tests.laws.law import RankTrace, compare, config_of, merge_ranks, reference, trace
from tests.laws.layouts import SGD
from tests.laws.worlds import restart_world, world

FUSED = {
    "fused_all_gather_matmul": symmetric._fused_all_gather_matmul_fallback,
    "fused_matmul_reduce_scatter": symmetric._fused_matmul_reduce_scatter_fallback,
}


class Seen(CustomGraphPass):
    """Counts the fused products of each graph, after the compiler put them there."""

    def __init__(self) -> None:
        self.names: Counter[str] = Counter()

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.names.update(str(node.target).split(".")[1] for node in graph.nodes if "symm_mem" in str(node.target))

    def uuid(self) -> Any:
        return None  # graphs that it was not shown are not taken from a cache


def traced(config: Config, backwards: bool) -> tuple[RankTrace, dict[str, int]]:
    """Two steps, and how often the compiler fused what. `backwards`: parts are handed to the wrong ranks."""
    seen, library = Seen(), torch.library.Library("symm_mem", "IMPL")
    for name, function in (FUSED | ({"fused_all_gather_matmul": _reversed} if backwards else {})).items():
        library.impl(name, function, "CPU")
    with (
        patch.object(parallelize, "enable_async_tp", enable_fused_collectives),
        patch.object(inductor, "post_grad_custom_post_pass", seen),
        patch.object(inductor, "_micro_pipeline_tp", False),
        patch.object(inductor, "post_grad_custom_pre_pass", None),
        patch.object(torch.distributed, "is_nccl_available", lambda: True),  # the compiler asks, on any device
    ):
        found = trace(config, 2)
    library._destroy()
    return found, dict(seen.names)


def _reversed(shard: torch.Tensor, others: list[torch.Tensor], dim: int, group: str, **kwargs: Any) -> Any:
    whole, outputs = FUSED["fused_all_gather_matmul"](shard, others, dim, group, **kwargs)
    return whole, [output.flip(dim) for output in outputs]


@pytest.mark.parametrize("recompute", ["none", pytest.param("selective", marks=pytest.mark.slow)])
def test_fused_products_compute_the_same_step(recompute: str) -> None:
    parallel = {"tp": 2, "async_tp": True, "recompute": recompute}
    config = config_of(2, {}, optim=SGD, compile=True, parallel=parallel)
    restart_world(2)
    traces, counts = zip(*world(2).run(traced, config, False), strict=True)
    # Forward, before q, k and v, and gate and up; and after attention, and down. Backward, before the latter two.
    assert counts[0] == counts[1]
    assert counts[0]["fused_all_gather_matmul"] >= 4
    assert counts[0]["fused_matmul_reduce_scatter"] >= 2
    compare(merge_ranks(traces), reference(config, 2))


def test_a_part_in_the_wrong_place_breaks_the_law() -> None:
    config = config_of(2, {}, optim=SGD, compile=True, parallel={"tp": 2, "async_tp": True})
    restart_world(2)
    traces = [found for found, _ in world(2).run(traced, config, True)]
    with pytest.raises(AssertionError, match="off by"):
        compare(merge_ranks(traces), reference(config, 2))
