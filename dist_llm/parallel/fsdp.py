"""Data parallelism by FSDP2: sharded, replicated or hybrid, on a mesh with the axes (replicas, shards)."""

from typing import Any

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
)

from dist_llm.compat import fully_shard_on_two_meshes
from dist_llm.config.parallel_section import ParallelConfig
from dist_llm.config.schema import Config
from dist_llm.models.decoder import Decoder
from dist_llm.models.moe import MoE
from dist_llm.parallel.mesh import EXPERT_SHARD_AXIS, get_fsdp_mesh
from dist_llm.parallel.p2p_collectives import use_p2p_collectives
from dist_llm.parallel.precision import fsdp_policy


def apply_fsdp(model: Decoder, config: Config, mesh: DeviceMesh, expert_mesh: DeviceMesh | None = None) -> None:
    """Shard each block, then the remaining parameters, over dp_shard and cp; replicate over dp_replicate.

    If dp_shard and cp are 1, the shards are full parameters: the all-gather moves no bytes, and the only communication
    is the all-reduce of the gradients over dp_replicate. Experts are sharded over the expert_shard axis of
    `expert_mesh` instead.
    """
    parallel = config.parallel
    policy = fsdp_policy(config.precision)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if parallel.cpu_offload else OffloadPolicy()
    data_mesh = get_fsdp_mesh(mesh)

    options: dict[str, Any] = {"mp_policy": policy, "offload_policy": offload}
    expert_data_mesh = None if expert_mesh is None else expert_mesh["dp_replicate", EXPERT_SHARD_AXIS]
    # A pipeline stage runs forward many times per step, so resharding after each forward would repeat the all-gather.
    reshard_blocks = parallel.reshard == "default" and data_mesh.size(1) > 1 and parallel.pp == 1
    last_block = len(model.blocks) - 1
    for index, block in enumerate(model.blocks.values()):
        # Backward starts with the last block, so its weights stay gathered.
        options["reshard_after_forward"] = parallel.reshard == "always" or (reshard_blocks and index < last_block)
        feedforward = block.feedforward
        if expert_data_mesh is not None and isinstance(feedforward, MoE):
            fully_shard_on_two_meshes(block, data_mesh, feedforward.experts, expert_data_mesh, **options)
        else:
            fully_shard(block, mesh=data_mesh, **options)
    options["reshard_after_forward"] = parallel.reshard == "always"
    fully_shard(model, mesh=data_mesh, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is already divided by the number of valid tokens of all ranks, so gradients are summed.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no PREMUL_SUM
    if data_mesh.size(1) > 1 or (expert_data_mesh is not None and expert_data_mesh.size(1) > 1):
        use_p2p_collectives(model, mesh.device_type)


def prepare_microbatch(model: Decoder, is_last: bool, parallel: ParallelConfig) -> None:
    """Set whether the next backward pass reduces gradients and reshards weights at its end.

    `is_last` says that the next microbatch is the last one of the step. Gradients are reduced after the last
    microbatch, or with parallel.reduce_each_microbatch after each microbatch. With parallel.reshard "never", weights
    stay gathered until the end of the step, because only the optimizer step changes them.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last or parallel.reduce_each_microbatch)
        model.set_reshard_after_backward(is_last or parallel.reshard != "never")


def reshard(model: Decoder) -> None:
    """Drop gathered weights, so that the next forward pass gathers them again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
