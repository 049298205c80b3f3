"""Data parallelism by FSDP2: sharded, replicated or hybrid, on one two-dimensional mesh."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
)

from dist_llm.config.schema import Config, ParallelConfig
from dist_llm.models.decoder import Decoder
from dist_llm.parallel.mesh import fsdp_mesh
from dist_llm.parallel.p2p_collectives import use_p2p_collectives
from dist_llm.parallel.precision import fsdp_policy


def apply_fsdp(model: Decoder, config: Config, mesh: DeviceMesh) -> None:
    """Shard each block, then the remaining parameters, over dp_shard and cp; replicate over dp_replicate.

    A replicated run (dp_shard 1) uses the same code. Its shards are full parameters, so the all-gather moves nothing
    and only the all-reduce of the gradients remains.
    """
    parallel = config.parallel
    policy = fsdp_policy(config.precision)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if parallel.cpu_offload else OffloadPolicy()
    data_mesh = fsdp_mesh(mesh)

    def wrap(module: nn.Module, reshard: bool) -> None:
        fully_shard(module, mesh=data_mesh, mp_policy=policy, offload_policy=offload, reshard_after_forward=reshard)

    # A pipeline stage runs forward many times per step: gathering each time would cost more than resharding saves.
    reshard_blocks = parallel.reshard == "default" and data_mesh.size(1) > 1 and parallel.pp == 1
    last = len(model.blocks) - 1
    for number, block in enumerate(model.blocks.values()):
        # Backward starts with the last block: resharding its weights would only force another all-gather.
        wrap(block, parallel.reshard == "always" or (reshard_blocks and number < last))
    wrap(model, parallel.reshard == "always")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the world's number of valid tokens, so gradients are summed and never
            # averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
    if data_mesh.size(1) > 1:
        use_p2p_collectives(model, mesh.device_type)


def prepare_microbatch(model: Decoder, is_last: bool, parallel: ParallelConfig) -> None:
    """Set whether the next backward pass reduces gradients and reshards weights at its end.

    `is_last`: the next microbatch is the last one of the step. Gradients are reduced after the last microbatch, or
    after each with parallel.reduce_each_microbatch. With reshard "never", weights stay gathered between microbatches,
    because only the optimizer step changes them.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last or parallel.reduce_each_microbatch)
        model.set_reshard_after_backward(is_last or parallel.reshard != "never")


def reshard(model: Decoder) -> None:
    """Drop gathered weights, so that the next forward gathers them again. A backward does so at its end."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
