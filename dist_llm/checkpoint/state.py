"""What a checkpoint holds: weights and moments by parameter name, and the run's counters.

Nothing hidden needs restoring: learning rate, data order and dropout are functions of the step.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn, optim

from dist_llm.optim.scale import LossScale


@dataclass
class Progress:
    """How far the run is; `samples` is the next sample number, `loss_scale` what fp16 goes on with.

    `source_tokens` are those scored so far of each source, where there are several. `heldout_loss` is that of this
    very step, if it was evaluated.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    source_tokens: dict[str, int] = field(default_factory=dict)
    loss_scale: LossScale | None = None
    heldout_loss: float | None = None

    @staticmethod
    def of(fields: dict[str, Any]) -> "Progress":
        """From what `as_dict` gave."""
        scale = fields.pop("loss_scale", None)  # checkpoints of before fp16 have none
        return Progress(**fields, loss_scale=LossScale(**scale) if scale else None)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Named(Protocol):
    """A model, or an engine that holds parts of one."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def weights(model: Named) -> dict[str, Any]:
    """{"model.NAME": parameter}: the tensors that are written and read in place."""
    return {f"model.{name}": parameter.detach() for name, parameter in _first(model).items()}


def moments(model: Named, optimizer: optim.Optimizer) -> dict[str, Any]:
    """{"optim.NAME.KEY": tensor} of every parameter that has been stepped."""
    known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert known >= {parameter for _, parameter in model.named_parameters()}, "moments would be left out"
    return {
        f"optim.{name}.{key}": value
        for name, parameter in _first(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def allocate_moments(model: Named, optimizer: optim.Optimizer, saved: Mapping[str, tuple[int, ...]]) -> None:
    """Give each parameter the state that `saved` (name -> shape) lists, zero, for `moments` to be read into.

    The optimizer's settings are not in a checkpoint: those of the config in hand hold.
    """
    for name, parameter in model.named_parameters():
        prefix = f"optim.{name}."
        for key in (k.removeprefix(prefix) for k in saved if k.startswith(prefix)):
            if saved[prefix + key]:
                optimizer.state[parameter][key] = torch.zeros_like(parameter)
            else:
                optimizer.state[parameter][key] = torch.zeros((), device=parameter.device)


@torch.no_grad()
def copy_to_twins(model: Named, optimizer: optim.Optimizer | None) -> None:
    """After reading: a rank that holds a tied weight twice (both ends of a pipeline) has read it once."""
    first = _first(model)
    for name, parameter in model.named_parameters():
        if parameter is not first[name]:
            parameter.copy_(first[name])
            state = optimizer.state if optimizer is not None else {}
            for key, value in state.get(parameter, {}).items():
                value.copy_(state[first[name]][key])


def _first(model: Named) -> dict[str, nn.Parameter]:
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(name, parameter)
    return found
