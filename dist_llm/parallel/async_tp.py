"""Asynchronous tensor parallelism: a product begins on the part of its input that has come, and sends what is done.

With `sequence_parallel` an all-gather stands before each product of a block and a reduce-scatter after it. Cut into
pieces, they run while the product does (Wang et al. 2023). torch's compiler finds these pairs in a compiled block, and
puts kernels in their place that read the other ranks' memory.
"""

import logging
import warnings

from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger("dist_llm")


def overlap(mesh: DeviceMesh) -> None:
    """Before blocks are compiled. `mesh` is that of the tensor ranks."""
    if mesh.device_type == "cuda":
        fuse(mesh)
    else:
        log.info("parallel.async_tp: left out, its kernels are for GPUs; the steps are the same")


def fuse(mesh: DeviceMesh) -> None:
    """Let the compiler do so from now on."""
    from torch._inductor import config as inductor  # a second, unless this torch has it already (2.13 has)
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    with warnings.catch_warnings():  # needed still, though torch calls it deprecated
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(mesh.get_group().group_name)
