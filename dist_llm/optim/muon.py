"""Muon (Jordan et al. 2024): a matrix is updated by its orthogonalized momentum, equally in every direction."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, optim

from dist_llm.optim.adamw import ToLocal

# The quintic of Jordan et al. After five iterations it maps singular values in (0, 1] to about 0.7 ... 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
MAX_BATCH_ELEMENTS = 1 << 26  # upper bound of the elements orthogonalized at a time; several copies are made

# Orthogonalizes a list of momentum matrices, or of this rank's shards of them.
Orthogonalize = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Muon:
    """Updates the parameter groups of an AdamW that have a momentum. It is a pre-step hook and removes their gradients.

    The momentum is Nesterov's. An update is scaled by 0.2 sqrt(max(rows, columns)), to the size of AdamW's updates (Liu
    et al. 2025, 2.2), so that both use the same learning rate and weight decay. A missing gradient counts as zero.
    """

    def __init__(self, orthogonalize: Orthogonalize, local: ToLocal) -> None:
        self.orthogonalize, self.local = orthogonalize, local

    @torch.no_grad()
    def __call__(self, optimizer: optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            if "momentum" in group:
                self._step(group, optimizer.state)

    def _step(self, group: dict[str, Any], state: Any) -> None:
        updates, beta, local = [], group["momentum"], self.local
        for parameter in group["params"]:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if "momentum_buffer" not in state[parameter]:
                state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = local(state[parameter]["momentum_buffer"]).lerp_(local(gradient), 1 - beta)
            local(gradient).lerp_(buffer, beta)
            updates.append(gradient)
            parameter.grad = None
        for parameter, update in zip(group["params"], self.orthogonalize(updates), strict=True):
            weights = local(parameter).mul_(1 - group["lr"] * group["weight_decay"])
            weights.add_(local(update), alpha=-0.2 * group["lr"] * max(parameter.shape) ** 0.5)


def orthogonalize(matrices: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Orthogonalize each matrix [R, C] in `dtype`, or in its own dtype. Matrices of equal shape are batched."""
    results: dict[int, Tensor] = {}
    by_shape = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_shape[matrix.shape].append(index)
    for shape, indices in by_shape.items():
        count = max(1, MAX_BATCH_ELEMENTS // shape.numel())
        for chunk in (indices[start : start + count] for start in range(0, len(indices), count)):
            batch = torch.stack([matrices[index].to(dtype) for index in chunk])
            results.update(zip(chunk, newton_schulz(batch), strict=True))
    return [results[index] for index in range(len(matrices))]


def newton_schulz(x_NRC: Tensor) -> Tensor:
    """[N, R, C] -> approximately U V^T of each U S V^T, by Newton-Schulz iterations in the dtype of the input."""
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
