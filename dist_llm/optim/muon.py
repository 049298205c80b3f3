"""Muon (Jordan et al. 2024): a matrix moves by its momentum made orthogonal, so by as much in every direction."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, optim

from dist_llm.optim.adamw import Local

# Of Jordan et al.: a quintic that, five times over, takes singular values in (0, 1] to 0.7 ... 1.2, small ones fast.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5
BATCH = 1 << 26  # elements at a time at most, of which some copies are made

# Updates of matrices, or what a rank has of them, to the same made orthogonal.
Orthogonalize = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Muon:
    """Steps an AdamW's groups that have a momentum; a hook before AdamW's own step, which finds no gradients there.

    Momentum is Nesterov's. An update is scaled by 0.2 sqrt(max(rows, columns)), to the size that AdamW's have (Liu et
    al. 2025, 2.2), so that rate and decay are those of all parameters. One without a gradient has a gradient of zero.
    """

    def __init__(self, orthogonalize: Orthogonalize, local: Local) -> None:
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


def orthogonalized(matrices: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Each [R, C] as `orthogonal` makes it in that dtype, or in its own; those of one shape in batches."""
    found: dict[int, Tensor] = {}
    alike = defaultdict(list)
    for number, matrix in enumerate(matrices):
        alike[matrix.shape].append(number)
    for shape, numbers in alike.items():
        count = max(1, BATCH // shape.numel())
        for some in (numbers[first : first + count] for first in range(0, len(numbers), count)):
            batch = torch.stack([matrices[number].to(dtype) for number in some])
            found.update(zip(some, orthogonal(batch), strict=True))
    return [found[number] for number in range(len(matrices))]


def orthogonal(x_NRC: Tensor) -> Tensor:
    """[N, R, C] -> U V^T of each U S V^T, nearly, by Newton-Schulz steps in the dtype of the input."""
    if x_NRC.shape[1] > x_NRC.shape[2]:
        return orthogonal(x_NRC.mT).mT
    exact = torch.promote_types(x_NRC.dtype, torch.float32)
    norm_N11 = torch.linalg.matrix_norm(x_NRC.to(exact), keepdim=True)
    x_NRC = x_NRC / (norm_N11 + 1e-20).to(x_NRC.dtype)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        square_NRR = x_NRC @ x_NRC.mT
        both_NRR = torch.baddbmm(square_NRR, square_NRR, square_NRR, beta=b, alpha=c)
        x_NRC = torch.baddbmm(x_NRC, both_NRR, x_NRC, beta=a)
    return x_NRC
