"""Asynchronous tensor parallelism: overlap each matrix product with the collective beside it.

With `sequence_parallel` an all-gather precedes each product of a block and a reduce-scatter follows it. Split into
chunks, the collective runs while the product runs (Wang et al. 2023). torch's compiler finds these pairs in a compiled
block and replaces each with a kernel that reads the other ranks' memory directly.
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
    """Call this before blocks are compiled. `mesh` is the tensor-parallel dimension."""
    if mesh.device_type == "cuda":
        enable_fused_collectives(mesh)
    else:
        log.info("parallel.async_tp: not used on this device, its kernels need GPUs; the steps are the same")


def enable_fused_collectives(mesh: DeviceMesh) -> None:
    """Make the compiler fuse collectives with matrix products in all later compilations."""
    with warnings.catch_warnings():  # torch marks a part of it deprecated that is still required
        warnings.simplefilter("ignore", FutureWarning)
        fuse_collectives(merge_reshapes, (__file__,), mesh.get_group().group_name)


def merge_reshapes(graph: Graph) -> None:
    """Replace a reshape of a reshape by one reshape, or by none.

    The compiler only matches a product whose input is the gathered tensor itself. That tensor holds all tokens in one
    dimension, while the layers view it by sequence.
    """
    for node in graph.nodes:
        while node.target in RESHAPE_OPS and (inner := node.args[0]).target in RESHAPE_OPS:
            node.replace_input_with(inner, inner.args[0])
        if node.target in RESHAPE_OPS and node.meta["val"].shape == node.args[0].meta["val"].shape:
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
