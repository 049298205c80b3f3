"""The content of a checkpoint: weights and moments by parameter name, and the run's counters.

No other state has to be restored: learning rate, data order and dropout are functions of the step.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Protocol

import torch
from pydantic import AliasChoices, Field, TypeAdapter
from torch import Tensor, nn, optim

from dist_llm.config.section import Count
from dist_llm.errors import CheckpointError
from dist_llm.optim.loss_scale import LossScale


@dataclass
class GuardState:
    """State of the guard: recent losses of good steps, how much of guard.budget is used, and the samples left out."""

    losses: list[float] = field(default_factory=list)
    # Named `spent` up to version 0.1.
    num_used: Annotated[int, Field(validation_alias=AliasChoices("num_used", "spent"))] = 0
    left_out: list[tuple[int, int]] = field(default_factory=list)  # ranges [first, end)


@dataclass
class Progress:
    """Progress of a run. `samples` is the number of the next sample; `loss_scale` is the state of fp16's dynamic loss
    scale.

    `source_tokens` counts the scored tokens of each data source, if there are several. `heldout_loss` is the loss of
    this step, if it was evaluated.
    """

    step: Count = 0
    samples: Count = 0
    tokens: Count = 0
    source_tokens: dict[str, int] = field(default_factory=dict)
    loss_scale: LossScale | None = None
    heldout_loss: float | None = None
    guard: GuardState = field(default_factory=GuardState)

    @staticmethod
    def parse(content: bytes) -> "Progress":
        """Parse the JSON of `as_dict`. Fields that older checkpoints lack get defaults. Raises ValueError for other
        content."""
        return TypeAdapter(Progress).validate_json(content, strict=True)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class HasNamedParameters(Protocol):
    """A model, or an engine that has parts of a model."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


class CheckpointState(Protocol):
    """Access to a rank's tensors by the names of a checkpoint. Each is a tensor, a DTensor or a `FlatShard`."""

    def weights(self) -> dict[str, Any]:
        """Return {"model.NAME": parameter}, to be written, or to be read in place."""
        ...

    def moments(self) -> dict[str, Any]:
        """Return {"optim.NAME.KEY": tensor} of all parameters that have optimizer state."""
        ...

    def allocate_moments(self, saved: Mapping[str, tuple[int, ...]]) -> None:
        """Allocate the optimizer state that `saved` (name -> shape) lists, as zeros, so that `moments` can be read into
        it.

        The optimizer's settings are not in a checkpoint: those of the current config apply.
        """
        ...

    def after_load(self) -> None:
        """Update everything that is derived from the tensors that were read."""
        ...


@dataclass(frozen=True)
class TorchState:
    """`CheckpointState` of plain torch: a model's parameters, and the moments if there is an optimizer.

    `drop_gathered` drops copies of the weights that the next forward would use in place of those that were read.
    """

    model: HasNamedParameters
    optimizer: optim.Optimizer | None = None
    drop_gathered: Callable[[], None] = lambda: None

    def weights(self) -> dict[str, Any]:
        return {f"model.{name}": parameter.detach() for name, parameter in self._unique_parameters().items()}

    def moments(self) -> dict[str, Any]:
        if self.optimizer is None:
            return {}
        known = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        assert known >= {parameter for _, parameter in self.model.named_parameters()}, "moments would be left out"
        return {
            f"optim.{name}.{key}": value
            for name, parameter in self._unique_parameters().items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }

    def allocate_moments(self, saved: Mapping[str, tuple[int, ...]]) -> None:
        if self.optimizer is None:
            return
        self.optimizer.state.clear()
        groups = {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self.model.named_parameters():
            moments = moment_shapes(saved, name)
            check_moment_names(name, moments, groups[parameter])
            for key, shape in moments.items():
                dtype = getattr(self.optimizer, "moment_dtypes", {}).get(key)
                empty = torch.zeros_like(parameter, dtype=dtype) if shape else torch.zeros((), device=parameter.device)
                self.optimizer.state[parameter][key] = empty

    @torch.no_grad()
    def after_load(self) -> None:
        """Copy tied weights that this rank has twice (both ends of a pipeline), since they are read once."""
        self.drop_gathered()
        first = self._unique_parameters()
        for name, parameter in self.model.named_parameters():
            if parameter is not first[name]:
                parameter.copy_(first[name])
                state = self.optimizer.state if self.optimizer is not None else {}
                for key, value in state.get(parameter, {}).items():
                    value.copy_(state[first[name]][key])

    def _unique_parameters(self) -> dict[str, nn.Parameter]:
        parameters: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            parameters.setdefault(name, parameter)
        return parameters


def check_moment_names(name: str, moments: Collection[str], group: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the saved moments of a parameter are not those that this group's optimizer has."""
    expected = {"step", "exp_avg", "exp_avg_sq"}
    if "momentum" in group:  # SGD and Muon
        expected = {"momentum_buffer"} if group["momentum"] else set()
    if moments and set(moments) != expected:
        raise CheckpointError(
            f"optim.name: the checkpoint's optimizer has {', '.join(sorted(moments))} of {name}, this one needs "
            f"{', '.join(sorted(expected)) or 'nothing'}; set optim.name as it was, or start a new run with init_from "
            "and init_optimizer: fresh"
        )


def moment_shapes(saved: Mapping[str, tuple[int, ...]], name: str) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of the moments that a checkpoint has of a parameter."""
    prefix = f"optim.{name}."
    return {key.removeprefix(prefix): shape for key, shape in saved.items() if key.startswith(prefix)}
