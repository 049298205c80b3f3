"""Clipping by the global norm (Pascanu et al. 2013)."""

from collections.abc import Sequence

import torch
from torch import Tensor

ROW = 1024  # elements whose squares are added in one go


def norm(gradients: Sequence[Tensor]) -> Tensor:
    """The L2 norm over all elements of all gradients, as if they were one vector; in fp32 or, of fp64, in fp64."""
    if not gradients:
        return torch.zeros(())
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    if gradients[0].is_cuda:
        norms = list(torch._foreach_norm(list(gradients), 2.0, dtype=dtype))
    else:
        norms = [_norm_on_cpu(gradient.to(dtype)) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def scale(gradients: Sequence[Tensor], norm_before: Tensor, max_norm: float, loss_scale: float = 1.0) -> None:
    """Multiply all by max_norm / (norm + 1e-6) where that is below 1, without a device sync.

    Gradients that are `loss_scale` times too large (`norm_before` is not) are brought back in the same pass.
    """
    torch._foreach_mul_(list(gradients), (max_norm / (norm_before + 1e-6)).clamp(max=1.0) / loss_scale)


def _norm_on_cpu(gradient: Tensor) -> Tensor:
    """By rows: torch's CPU kernel adds a tensor's squares one after another, 1e-5 off at a million."""
    flat = gradient.reshape(-1)
    whole = len(flat) // ROW * ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, ROW), dim=1)
    return torch.linalg.vector_norm(torch.cat((rows, flat[whole:])))
