"""The global gradient norm of a model that is sharded over any mesh dimensions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dist_llm.models.decoder import Decoder
from dist_llm.optim import gradient_clipping
from dist_llm.parallel.mesh import SHARD_AXES, all_reduce_over
from dist_llm.sharded import coordinate, is_sharded_over, to_local


def compute_grad_norm(model_parts: Sequence[Decoder], mesh: DeviceMesh | None, device: torch.device) -> Tensor:
    """Return the norm over all parameters of the full model, [], each element counted once; on every rank.

    Parameters that all tensor ranks hold are counted on the first one only. The copy of a tied embedding on the last
    pipeline stage is not counted.
    """
    first_tp_rank = coordinate(mesh, "tp") == 0
    gradients = []
    for model_part in model_parts:
        for name, parameter in model_part.named_parameters():
            is_tied_copy = name == "embed.tokens.weight" and not model_part.is_first_stage
            counted_here = first_tp_rank or is_sharded_over(parameter, "tp")
            if parameter.grad is not None and counted_here and not is_tied_copy:
                gradients.append(to_local(parameter.grad))
    norm = gradient_clipping.global_norm(gradients).to(device)
    if mesh is None:
        return norm
    square = all_reduce_over(norm.square(), mesh, ("pp", *SHARD_AXES, "tp"))
    replicas = mesh["dp_replicate"].size()
    if mesh.size() > replicas:
        # Replicas may sum in different orders on some networks. Their mean is the same on all of them.
        square = all_reduce_over(square, mesh, ("dp_replicate",)) / replicas
    return square.sqrt()
