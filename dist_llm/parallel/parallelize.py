"""Build the model of a config on this rank: pipeline stages, all forms of parallelism, initial values."""

import torch
from torch.distributed.device_mesh import DeviceMesh

from dist_llm.config.schema import Config
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.models.build_model import build_model, build_param_specs
from dist_llm.models.decoder import Decoder
from dist_llm.models.init import init_param_
from dist_llm.models.moe import MoE
from dist_llm.optim.param_groups import freeze_parameters
from dist_llm.parallel.activation_checkpoint import checkpoint_blocks, compile_blocks
from dist_llm.parallel.async_tp import enable_async_tp
from dist_llm.parallel.context_parallel import apply_context_parallel
from dist_llm.parallel.expert_parallel import apply_expert_parallel
from dist_llm.parallel.fp8 import check_float8_support, use_float8_linears
from dist_llm.parallel.fsdp import apply_fsdp
from dist_llm.parallel.mesh import STAGE_AXES, TOKEN_AXES
from dist_llm.parallel.pipeline_parallel import count_stages, split_layers, stages_of_rank
from dist_llm.parallel.tp_plan import apply_tensor_parallel
from dist_llm.sharded import local_with_offset


def build_model_parts(
    config: Config, mesh: DeviceMesh | None, device: torch.device, expert_mesh: DeviceMesh | None = None
) -> list[Decoder]:
    """Build the parts of the model on this rank: one, or one per pipeline stage of this rank.

    `expert_mesh` is the mesh of the experts, if the model has experts and there are several ranks.
    """
    if config.fp8:
        check_float8_support(device)
    model_parts = _build_stages(config, mesh)
    for model_part in model_parts:
        parallelize_model(model_part, config, mesh, expert_mesh)
        model_part.to_empty(device="cpu" if config.parallel.cpu_offload else device)
        init_parameters(model_part, config)
        for module in model_part.modules():
            if isinstance(module, MoE):
                module.init_buffers(device)  # under cpu_offload, only the parameters are in host memory
    return model_parts


def parallelize_model(
    model: Decoder, config: Config, mesh: DeviceMesh | None, expert_mesh: DeviceMesh | None = None
) -> None:
    """Apply all forms of parallelism to `model`, whose parameters are on the meta device.

    The order matters. Float8, context, expert and tensor parallelism change what a block computes, and create
    parameters. Freezing comes after them. Compilation and activation checkpointing then wrap the forward of a block,
    and FSDP adds hooks around this forward. The caller initializes the parameters afterwards, because each rank
    initializes only its shards.
    """
    parallel = config.parallel
    if config.fp8:
        use_float8_linears(model)
    if mesh is not None and parallel.cp > 1:
        apply_context_parallel(model, mesh["cp"])
    if mesh is not None and expert_mesh is not None:
        apply_expert_parallel(model, mesh, expert_mesh, parallel)
    if mesh is not None and parallel.tp > 1:
        apply_tensor_parallel(model, mesh["tp"], parallel.sequence_parallel)
        if parallel.async_tp:
            enable_async_tp(mesh["tp"])
    freeze_parameters(config.optim, model)
    if config.compile:
        compile_blocks(model, parallel)
    if parallel.recompute != "none" or parallel.activations_gib:
        checkpoint_blocks(model, parallel.recompute, config.compile)
    # Experts are not split over tp, so their gradients are summed over tp too.
    summed_axes = TOKEN_AXES if expert_mesh is None else STAGE_AXES
    if mesh is not None and any(mesh[axis].size() > 1 for axis in summed_axes):
        apply_fsdp(model, config, mesh, expert_mesh)


def init_parameters(model: Decoder, config: Config) -> None:
    """Initialize each parameter, or its shard on this rank, as a function of (seed, name, element index)."""
    specs = build_param_specs(config.model)
    for name, parameter in model.named_parameters():
        shard, offset = local_with_offset(parameter.detach())
        init_param_(shard, name, specs[name].init, config.run.seed, parameter.shape, offset)


def _build_stages(config: Config, mesh: DeviceMesh | None) -> list[Decoder]:
    """Build the pipeline stages of this rank on the meta device, unsharded and without values."""
    parallel = config.parallel
    num_stages = count_stages(parallel.pp_schedule, parallel.pp) if parallel.pp > 1 else 1
    local_stages = [0]
    if mesh and num_stages > 1:
        local_stages = stages_of_rank(parallel.pp_schedule, mesh.get_local_rank("pp"), parallel.pp)
    layers = split_layers(config.model, num_stages, parallel.pp_split)
    model_parts = []
    for stage in local_stages:
        with torch.device("meta"):
            model_part = build_model(config.model, CrossEntropy(config.loss.label_smoothing, config.loss.z_loss))
        model_part.trim_to_stage(layers[stage], is_first=stage == 0, is_last=stage == num_stages - 1)
        model_parts.append(model_part)
    return model_parts
