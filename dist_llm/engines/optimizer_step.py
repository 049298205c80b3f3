"""Clip gradients and take one optimizer step at a given learning rate."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn, optim

from dist_llm.optim import gradient_clipping
from dist_llm.sharded import to_local


def clip_and_unscale_(
    parameters: Iterable[nn.Parameter], norm: Tensor, max_norm: float | None, loss_scale: float
) -> None:
    """Clip the gradients to `max_norm` (None: no clipping) and divide them by `loss_scale`, in place.

    `norm` is the global gradient norm without the loss scale.
    """
    if max_norm or loss_scale != 1.0:
        grads = [to_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        if grads:  # a pipeline stage may have only frozen parameters
            gradient_clipping.clip_grads_(grads, norm, max_norm or math.inf, loss_scale)


def set_learning_rate(param_groups: Iterable[dict[str, Any]], lr: float) -> None:
    """Set the learning rate of each parameter group to `lr` times its "lr_mult"."""
    for group in param_groups:
        group["lr"] = lr * group["lr_mult"]


def step_and_zero_grad(optimizer: optim.Optimizer, lr: float) -> None:
    """Set the learning rates, step, and clear the gradients."""
    set_learning_rate(optimizer.param_groups, lr)
    optimizer.step()
    optimizer.zero_grad()
