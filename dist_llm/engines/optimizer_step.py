"""One optimizer step at a given learning rate."""

from torch import optim


def step_and_zero_grad(optimizer: optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameter groups, step, and clear the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
