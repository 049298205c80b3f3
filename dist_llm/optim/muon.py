"""Muon (Jordan et al. 2024): update a matrix by its orthogonalized momentum.

Shape suffixes: N matrices of R rows and C columns.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn, optim

from dist_llm.optim.adamw import ToLocal

# The quintic polynomial a x + b x^3 + c x^5 of Jordan et al. Five iterations map singular values in (0, 1] to about
# 0.7 ... 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
UPDATE_SCALE = 0.2  # root mean square of an update, as of AdamW (Liu et al. 2025, 2.2)
MAX_BATCH_ELEMENTS = 1 << 26  # maximum number of elements in a batch of matrices; iterations need several copies

# Orthogonalizes a list of momentum matrices, or of this rank's shards of them.
Orthogonalize = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Muon:
    """A pre-step hook of an AdamW optimizer. It updates `matrices`, whose parameter groups have a "momentum".

    It removes their gradients, so that AdamW skips them. The momentum is Nesterov's. An update is scaled by
    UPDATE_SCALE * sqrt(max(R, C)) to the size of an AdamW update, so that both optimizers use the same
    learning rate and weight decay. A missing gradient counts as zero. All groups are orthogonalized together, because
    the ranks share this work.
    """

    def __init__(self, matrices: Sequence[nn.Parameter], orthogonalize: Orthogonalize, to_local: ToLocal) -> None:
        self.matrices, self.orthogonalize, self.to_local = matrices, orthogonalize, to_local

    @torch.no_grad()
    def __call__(self, optimizer: optim.Optimizer, *_: Any) -> None:
        groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
        updates, to_local = [], self.to_local
        for parameter in self.matrices:
            state, beta = optimizer.state[parameter], groups[parameter]["momentum"]
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = to_local(state["momentum_buffer"]).lerp_(to_local(gradient), 1 - beta)
            to_local(gradient).lerp_(buffer, beta)
            updates.append(gradient)
            parameter.grad = None
        for parameter, update in zip(self.matrices, self.orthogonalize(updates), strict=True):
            group = groups[parameter]
            weights = to_local(parameter).mul_(1 - group["lr"] * group["weight_decay"])
            weights.add_(to_local(update), alpha=-UPDATE_SCALE * group["lr"] * max(parameter.shape[-2:]) ** 0.5)


def orthogonalize(matrices: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Orthogonalize each matrix [R, C], computed in `dtype` (None: its own dtype). Batch matrices of equal shape.

    A tensor [E, R, C] is a matrix per expert.
    """
    if any(matrix.ndim == 3 for matrix in matrices):
        counts = [len(matrix) if matrix.ndim == 3 else 1 for matrix in matrices]
        flat = [expert for matrix in matrices for expert in (matrix if matrix.ndim == 3 else (matrix,))]
        results = iter(orthogonalize(flat, dtype))
        stacks = [list(islice(results, count)) for count in counts]
        return [
            (torch.stack(stack) if stack else matrix) if matrix.ndim == 3 else stack[0]
            for matrix, stack in zip(matrices, stacks, strict=True)
        ]
    orthogonalized: dict[int, Tensor] = {}
    indices_by_shape = defaultdict(list)
    for index, matrix in enumerate(matrices):
        indices_by_shape[matrix.shape].append(index)
    for shape, indices in indices_by_shape.items():
        batch_size = max(1, MAX_BATCH_ELEMENTS // shape.numel())
        for start in range(0, len(indices), batch_size):
            batch_indices = indices[start : start + batch_size]
            batch_NRC = torch.stack([matrices[index].to(dtype) for index in batch_indices])
            orthogonalized.update(zip(batch_indices, newton_schulz(batch_NRC), strict=True))
    return [orthogonalized[index] for index in range(len(matrices))]


def newton_schulz(x_NRC: Tensor) -> Tensor:
    """Map each matrix U S V^T to about U V^T by Newton-Schulz iterations, in the dtype of the input: [N, R, C]."""
    if x_NRC.shape[1] > x_NRC.shape[2]:
        return newton_schulz(x_NRC.mT).mT
    norm_dtype = torch.promote_types(x_NRC.dtype, torch.float32)
    norm_N11 = torch.linalg.matrix_norm(x_NRC.to(norm_dtype), keepdim=True)
    x_NRC = x_NRC / (norm_N11 + 1e-20).to(x_NRC.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(NUM_ITERATIONS):
        square_NRR = x_NRC @ x_NRC.mT
        poly_NRR = torch.baddbmm(square_NRR, square_NRR, square_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, poly_NRR, x_NRC, beta=a)
    return x_NRC
