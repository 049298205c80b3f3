"""From a model on the meta device to one that is laid out and has its values: the order, written once."""

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dist_llm.config.schema import Config
from dist_llm.models.decoder import Decoder
from dist_llm.models.init import fill, rule_for
from dist_llm.parallel.shard import shard


def parallelize(model: Decoder, config: Config, mesh: DeviceMesh | None, device: torch.device) -> None:
    """Lay `model` out over `mesh` (None: one process) and set its initial values.

    The order matters: compiled blocks are what FSDP hooks into, and values are set last, so that
    a rank only ever holds, and computes, its own share.
    """
    if config.compile:
        for block in model.blocks.values():
            block.compile()
    if mesh is not None:
        shard(model, config, mesh)
    model.to_empty(device=device)
    initialise(model, config)


def initialise(model: Decoder, config: Config) -> None:
    """Each parameter, or this rank's slice of it, from (seed, name, element)."""
    for name, parameter in model.named_parameters():
        rule = rule_for(name, parameter.shape, config.model)
        if isinstance(parameter, DTensor):
            _, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            fill(parameter.to_local(), name, rule, config.run.seed, parameter.shape, offset)
        else:
            fill(parameter.detach(), name, rule, config.run.seed, parameter.shape, (0,) * parameter.ndim)
