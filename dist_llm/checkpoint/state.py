"""What a checkpoint holds: weights and moments by parameter name, and the run's counters.

Nothing hidden needs restoring: learning rate, data order and dropout are functions of the step.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn, optim


@dataclass
class Progress:
    """How far the run is; `samples` is the next sample number."""

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def weights(model: nn.Module) -> dict[str, Any]:
    """{"model.NAME": parameter}: the tensors that DCP reads from and writes to."""
    return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}


def moments(model: nn.Module, optimizer: optim.Optimizer) -> dict[str, Any]:
    """{"optim.NAME.KEY": tensor} of every parameter that has been stepped."""
    return {
        f"optim.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def allocate_moments(model: nn.Module, optimizer: optim.Optimizer, saved: dict[str, tuple[int, ...]]) -> None:
    """Give each parameter the state that `saved` (name -> shape) lists, zero, for `moments` to load into.

    The optimizer's settings are not loaded: those of the config in hand hold.
    """
    for name, parameter in model.named_parameters():
        prefix = f"optim.{name}."
        for key in (k.removeprefix(prefix) for k in saved if k.startswith(prefix)):
            if saved[prefix + key]:
                optimizer.state[parameter][key] = torch.zeros_like(parameter)
            else:
                optimizer.state[parameter][key] = torch.zeros((), device=parameter.device)
