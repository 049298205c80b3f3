"""Asynchronous tensor parallelism: a product begins on the part of its input that has come, and sends what is done.

With `sequence_parallel` an all-gather stands before each product of a block and a reduce-scatter after it. Cut into
pieces, they run while the product does (Wang et al. 2023). torch's compiler finds these pairs in a compiled block, and
puts kernels in their place that read the other ranks' memory.
"""

import logging
import warnings
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import Graph

RESHAPE_OPS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)
log = logging.getLogger("dist_llm")


def enable_async_tp(mesh: DeviceMesh) -> None:
    """Before blocks are compiled. `mesh` is that of the tensor ranks."""
    if mesh.device_type == "cuda":
        enable_fused_collectives(mesh)
    else:
        log.info("parallel.async_tp: left out, its kernels are for GPUs; the steps are the same")


def enable_fused_collectives(mesh: DeviceMesh) -> None:
    """Let the compiler do so from now on."""
    from torch._inductor import config as inductor  # a second, unless this torch has it already (2.13 has)
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    class Pass(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            merge_reshapes(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((__file__,))

    inductor._micro_pipeline_tp = True
    inductor.post_grad_custom_pre_pass = Pass()
    with warnings.catch_warnings():  # needed still, though torch calls it deprecated
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(mesh.get_group().group_name)


def merge_reshapes(graph: Graph) -> None:
    """A reshape of a reshape becomes one, or none: the compiler looks for products of the very thing that was gathered,
    which is all tokens in a row, and layers see them by sequences."""
    for node in graph.nodes:
        while node.target in RESHAPE_OPS and (inner := node.args[0]).target in RESHAPE_OPS:
            node.replace_input_with(inner, inner.args[0])
        if node.target in RESHAPE_OPS and node.meta["val"].shape == node.args[0].meta["val"].shape:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
