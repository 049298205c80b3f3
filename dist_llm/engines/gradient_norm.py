"""Compute the global gradient norm of a model that is sharded over any axes of the mesh."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dist_llm.models.decoder import Decoder
from dist_llm.optim import gradient_clipping
from dist_llm.parallel.mesh import PARAMETER_AXES, all_reduce_over_axes_
from dist_llm.sharded import coordinate, is_replicated_over, to_local


def compute_grad_norm(model_parts: Sequence[Decoder], mesh: DeviceMesh | None, device: torch.device) -> Tensor:
    """Return the gradient norm over all parameters of the full model, [], on every rank. Each element counts once.

    Parameters that are replicated over tp count on the first tensor-parallel rank only. The second copy of a tied
    embedding, on a later pipeline stage, does not count.
    """
    is_first_tp_rank = coordinate(mesh, "tp") == 0
    grads = []
    for model_part in model_parts:
        for name, parameter in model_part.named_parameters():
            is_counted = is_first_tp_rank or not is_replicated_over(parameter, "tp")
            if parameter.grad is not None and is_counted and not model_part.is_tied_copy(name):
                grads.append(to_local(parameter.grad))
    norm = gradient_clipping.compute_global_norm(grads).to(device)
    if mesh is None:
        return norm
    square_sum = all_reduce_over_axes_(norm.square(), mesh, PARAMETER_AXES)
    num_replicas = mesh["dp_replicate"].size()
    if mesh.size() > num_replicas:
        # Some networks sum in a different order on each replica. The mean is equal on all replicas.
        square_sum = all_reduce_over_axes_(square_sum, mesh, ("dp_replicate",)) / num_replicas
    return square_sum.sqrt()
