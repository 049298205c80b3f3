"""Asynchronous tensor parallelism: overlap each matrix product with the collective beside it.

With `sequence_parallel`, an all-gather precedes or a reduce-scatter follows each matrix product of a block. Both are
split into chunks, so that the collective of a chunk overlaps with the product of another chunk (Wang et al. 2023). The
compiler of torch finds these pairs in a compiled block and replaces each pair by one fused kernel, which reads the
memory of other ranks directly.
"""

import logging
import warnings

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.fx import Graph

from dist_llm.compat import fuse_collectives

RESHAPE_OPS = (torch.ops.aten.view.default, torch.ops.aten.reshape.default)
log = logging.getLogger("dist_llm")


def enable_async_tp(mesh: DeviceMesh) -> None:
    """Enable asynchronous tensor parallelism on GPUs. Call this before the blocks are compiled.

    `mesh` has only the axis tp.
    """
    if mesh.device_type == "cuda":
        enable_fused_collectives(mesh)
    else:
        log.info("parallel.async_tp: not used on this device, its kernels need GPUs; the steps are the same")


def enable_fused_collectives(mesh: DeviceMesh) -> None:
    """Make the compiler fuse collectives with matrix products in all later compilations."""
    with warnings.catch_warnings():  # torch warns that `enable_symm_mem_for_group` is deprecated, but still requires it
        warnings.simplefilter("ignore", FutureWarning)
        fuse_collectives(merge_reshapes, (__file__,), mesh.get_group().group_name)


def merge_reshapes(graph: Graph) -> None:
    """Merge each chain of reshapes in the graph into one reshape, or remove the chain if the shape stays the same.

    The compiler only fuses a product whose input is the gathered tensor itself. The gathered tensor has all tokens in
    one dimension, but the layers reshape it to [B, S, ...] and back.
    """
    for node in graph.nodes:
        while node.target in RESHAPE_OPS and (inner := node.args[0]).target in RESHAPE_OPS:
            node.replace_input_with(inner, inner.args[0])
        if node.target in RESHAPE_OPS and node.meta["val"].shape == node.args[0].meta["val"].shape:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
