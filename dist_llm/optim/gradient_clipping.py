"""Gradient clipping by the global norm (Pascanu et al. 2013)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_llm.compat import foreach_mul_, foreach_norm

ROW_ELEMENTS = 1024  # elements per partial sum of squares


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm over all elements of all gradients, [], in fp32, or in fp64 for fp64 gradients."""
    if not gradients:
        return torch.zeros(())
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    if gradients[0].is_cuda:
        norms = list(foreach_norm(list(gradients), 2.0, dtype=dtype))
    else:
        norms = [_norm_on_cpu(gradient.to(dtype)) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_grads_(gradients: Sequence[Tensor], norm_before: Tensor, max_norm: float, loss_scale: float = 1.0) -> None:
    """Multiply all gradients by max_norm / (norm + 1e-6) if that is below 1, without a device sync.

    If the gradients carry a `loss_scale`, they are unscaled in the same pass. `norm_before` is the unscaled norm.
    """
    foreach_mul_(list(gradients), (max_norm / (norm_before + 1e-6)).clamp(max=1.0) / loss_scale)


def _norm_on_cpu(gradient: Tensor) -> Tensor:
    """Compute the norm by rows. torch's CPU kernel sums all squares sequentially, with an error of 1e-5 at a million
    elements."""
    flat = gradient.reshape(-1)
    end = len(flat) // ROW_ELEMENTS * ROW_ELEMENTS  # of the full rows
    rows = torch.linalg.vector_norm(flat[:end].view(-1, ROW_ELEMENTS), dim=1)
    return torch.linalg.vector_norm(torch.cat((rows, flat[end:])))
