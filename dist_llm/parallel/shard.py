"""Data parallelism by FSDP2: sharded, replicated or both, on one two-dimensional mesh."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from dist_llm.config.schema import Config
from dist_llm.models.decoder import Decoder
from dist_llm.parallel.direct import send_directly
from dist_llm.parallel.mesh import data_mesh

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # fp32: nothing is cast


def shard(model: Decoder, config: Config, mesh: DeviceMesh) -> None:
    """Shard each block, then what is left, over dp_shard and cp; replicate over dp_replicate.

    A replicated run (dp_shard 1) is the same code: its shards are whole parameters, so gathering
    moves nothing and only the all-reduce of the gradients is left.
    """
    parallel = config.parallel
    dtype = DTYPES.get(config.precision)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if parallel.cpu_offload else OffloadPolicy()
    ranks = data_mesh(mesh)

    def wrap(module: nn.Module, reshard: bool) -> None:
        fully_shard(module, mesh=ranks, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)

    # A pipeline stage runs forward again and again: gathering each time would cost more than it frees.
    freeing = parallel.reshard == "default" and ranks.size(1) > 1 and parallel.pp == 1
    last = len(model.blocks) - 1
    for place, block in enumerate(model.blocks.values()):
        # Backward starts with the last block: freeing its weights only to gather them again is waste.
        wrap(block, parallel.reshard == "always" or (freeing and place < last))
    wrap(model, parallel.reshard == "always")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are already divided by the world's count: gradients are summed, never averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
    if ranks.size(1) > 1:
        send_directly(model, mesh.device_type)
