"""From a config to a model that is laid out and has its values: the order, written once."""

import torch
from torch.distributed.device_mesh import DeviceMesh

from dist_llm.config.schema import Config
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.models.build import build_model
from dist_llm.models.decoder import Decoder
from dist_llm.models.init import fill, rule_for
from dist_llm.parallel.async_tp import overlap
from dist_llm.parallel.context import context_parallel
from dist_llm.parallel.fp8 import check_device, float8_blocks
from dist_llm.parallel.mesh import DATA_AXES, place
from dist_llm.parallel.pipeline import split_layers, stage_count, stages_of
from dist_llm.parallel.recompute import compile_blocks, recompute_blocks
from dist_llm.parallel.shard import shard
from dist_llm.parallel.split import tensor_parallel


def build_parts(config: Config, mesh: DeviceMesh | None, device: torch.device) -> list[Decoder]:
    """This rank's parts of the model: one, or one per pipeline stage that it holds."""
    if config.fp8:
        check_device(device)
    parts = _cut(config, mesh)
    for part in parts:
        lay_out(part, config, mesh)
        part.to_empty(device="cpu" if config.parallel.cpu_offload else device)
        initialise(part, config)
    return parts


def lay_out(model: Decoder, config: Config, mesh: DeviceMesh | None) -> None:
    """The order matters: kernels and splits change what a block is, recomputation wraps what was
    compiled, FSDP hooks into all of it. Values are set after, on the share that a rank has."""
    parallel = config.parallel
    if config.fp8:
        float8_blocks(model)
    if mesh is not None and parallel.cp > 1:
        context_parallel(model, mesh["cp"])
    if mesh is not None and parallel.tp > 1:
        tensor_parallel(model, mesh["tp"], parallel.sequence_parallel)
        if parallel.async_tp:
            overlap(mesh["tp"])
    if config.compile:
        compile_blocks(model, parallel)
    if parallel.recompute != "none" or parallel.activations_gib:
        recompute_blocks(model, parallel.recompute, config.compile)
    if mesh is not None and any(mesh[axis].size() > 1 for axis in DATA_AXES):
        shard(model, config, mesh)


def initialise(model: Decoder, config: Config) -> None:
    """Each parameter, or this rank's slice of it, from (seed, name, element)."""
    for name, parameter in model.named_parameters():
        share, offset = place(parameter.detach())
        rule = rule_for(name, parameter.shape, config.model)
        fill(share, name, rule, config.run.seed, parameter.shape, offset)


def _cut(config: Config, mesh: DeviceMesh | None) -> list[Decoder]:
    """The parts on the meta device, whole in themselves and without values."""
    parallel = config.parallel
    count = stage_count(parallel.pp_schedule, parallel.pp) if parallel.pp > 1 else 1
    numbers = stages_of(parallel.pp_schedule, mesh.get_local_rank("pp"), parallel.pp) if mesh and count > 1 else [0]
    layers = split_layers(config.model, count, parallel.pp_split)
    parts = []
    for number in numbers:
        with torch.device("meta"):
            part = build_model(config.model, CrossEntropy(config.loss.label_smoothing, config.loss.z_loss))
        part.keep(layers[number], first=number == 0, last=number == count - 1)
        parts.append(part)
    return parts
