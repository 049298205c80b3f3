"""The state in a checkpoint: weights and moments (optimizer state) by parameter name, and the progress of the run.

Nothing else has to be restored, because learning rate, data order and dropout are functions of the step.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Protocol

import torch
from pydantic import AliasChoices, Field, TypeAdapter
from torch import Tensor, nn, optim

from dist_llm.config.section import NonNegativeInt
from dist_llm.errors import CheckpointError
from dist_llm.optim.loss_scale import LossScale


@dataclass
class GuardState:
    """State of the guard, which skips or repeats steps with an anomalous loss."""

    losses: list[float] = field(default_factory=list)  # of recent good steps
    # Number of bad steps so far that count towards guard.budget.
    # This field was named `spent` up to version 0.1.
    num_used: Annotated[int, Field(validation_alias=AliasChoices("num_used", "spent"))] = 0
    # The ranges [first, end) of sample numbers that a rewind left out. The key in progress.json is left_out.
    skipped_ranges: Annotated[list[tuple[int, int]], Field(validation_alias="left_out")] = field(default_factory=list)


@dataclass
class Progress:
    """The progress of a run, saved as progress.json."""

    step: NonNegativeInt = 0  # completed optimizer steps
    samples: NonNegativeInt = 0  # number of the next sample
    tokens: NonNegativeInt = 0  # valid tokens of all steps
    source_tokens: dict[str, int] = field(default_factory=dict)  # valid tokens by data source, if there are several
    loss_scale: LossScale | None = None  # dynamic loss scale of fp16
    heldout_loss: float | None = None  # result of an evaluation at this step, in nats per token
    guard: GuardState = field(default_factory=GuardState)

    @staticmethod
    def parse(content: bytes) -> "Progress":
        """Parse progress.json. Fields that older checkpoints lack get their defaults.

        Raises ValueError if malformed.
        """
        return TypeAdapter(Progress).validate_json(content, strict=True)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of progress.json."""
        content = asdict(self)
        content["guard"]["left_out"] = content["guard"].pop("skipped_ranges")
        return content


class HasNamedTensors(Protocol):
    """A model, or an engine that has parts of a model."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...


class CheckpointState(Protocol):
    """Access to the tensors of a rank by their names in a checkpoint.

    A value is a tensor, a DTensor or a `FlatShard`.
    """

    def weights(self) -> dict[str, Any]:
        """Return {"model.NAME": parameter or buffer}. A save writes these tensors; a load fills them in place."""
        ...

    def moments(self) -> dict[str, Any]:
        """Return {"optim.NAME.KEY": tensor} of all parameters that have optimizer state."""
        ...

    def allocate_moments(self, saved: Mapping[str, tuple[int, ...]]) -> None:
        """Allocate optimizer state of zeros for the moments in `saved` (name -> shape), so that a load can fill it.

        A checkpoint has no optimizer settings. The settings of the current config apply.
        """
        ...

    def after_load(self) -> None:
        """Update all state that is derived from the loaded tensors."""
        ...


@dataclass(frozen=True)
class TorchState:
    """The `CheckpointState` of a torch model and, if there is one, a torch optimizer.

    `drop_gathered` frees all-gathered weights, which the next forward pass would use instead of the loaded weights.
    """

    model: HasNamedTensors
    optimizer: optim.Optimizer | None = None
    drop_gathered: Callable[[], None] = lambda: None

    def weights(self) -> dict[str, Any]:
        tensors = self._unique_parameters() | dict(self.model.named_buffers())
        return {f"model.{name}": tensor.detach() for name, tensor in tensors.items()}

    def moments(self) -> dict[str, Any]:
        if self.optimizer is None:
            return {}
        optimized_params = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        trained_params = {parameter for _, parameter in self.model.named_parameters() if parameter.requires_grad}
        assert optimized_params >= trained_params, "the optimizer lacks parameters, whose moments would not be saved"
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
            if not parameter.requires_grad:
                continue  # optim.groups freezes it; moments of an earlier part of the run are dropped
            moments = select_moment_shapes(saved, name)
            check_moment_names(name, moments, groups[parameter])
            for key, shape in moments.items():
                dtype = getattr(self.optimizer, "moment_dtypes", {}).get(key)
                is_step_counter = not shape
                self.optimizer.state[parameter][key] = (
                    torch.zeros((), device=parameter.device)
                    if is_step_counter
                    else torch.zeros_like(parameter, dtype=dtype)
                )

    @torch.no_grad()
    def after_load(self) -> None:
        """Copy tied weights that this rank has twice, at both ends of a pipeline. A load fills only the first."""
        self.drop_gathered()
        unique_params = self._unique_parameters()
        for name, parameter in self.model.named_parameters():
            if parameter is not unique_params[name]:
                parameter.copy_(unique_params[name])
                state = self.optimizer.state if self.optimizer is not None else {}
                for key, value in state.get(parameter, {}).items():
                    value.copy_(state[unique_params[name]][key])

    def _unique_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name; of equal names, the first parameter."""
        parameters: dict[str, nn.Parameter] = {}
        for name, parameter in self.model.named_parameters():
            parameters.setdefault(name, parameter)
        return parameters


def check_moment_names(name: str, moments: Collection[str], group: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the saved moments of a parameter are those of the optimizer with this group."""
    expected = {"step", "exp_avg", "exp_avg_sq"}
    if "momentum" in group:  # SGD and Muon
        expected = {"momentum_buffer"} if group["momentum"] else set()
    if moments and set(moments) != expected:
        raise CheckpointError(
            f"optim.name: the checkpoint's optimizer has {', '.join(sorted(moments))} of {name}, this one needs "
            f"{', '.join(sorted(expected)) or 'nothing'}; set optim.name as it was, or start a new run with init_from "
            "and init_optimizer: fresh"
        )


def select_moment_shapes(saved: Mapping[str, tuple[int, ...]], name: str) -> dict[str, tuple[int, ...]]:
    """Return {key: shape} of the saved moments of a parameter."""
    prefix = f"optim.{name}."
    return {key.removeprefix(prefix): shape for key, shape in saved.items() if key.startswith(prefix)}
