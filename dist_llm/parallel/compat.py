"""One name for calls that torch renamed between 2.11 and 2.13."""

import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from torch import Tensor


def all_gather_autograd(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The ranks' tensors one after another along dimension 0; backward is a reduce-scatter."""
    if "all_gather_single_autograd" in vars(collectives):
        return collectives.all_gather_single_autograd(tensor.contiguous(), gather_dim=0, group=group)
    return collectives.all_gather_tensor_autograd(tensor.contiguous(), gather_dim=0, group=group)
