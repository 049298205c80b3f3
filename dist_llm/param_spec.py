"""What the rest of the system needs to know about each parameter of a model.

Each module that owns parameters has a method `param_specs`, which describes them. Initialization, weight decay, Muon,
tensor parallelism and resized vocabularies read these descriptions. They never compare names of parameters.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor, nn


@dataclass(frozen=True)
class InitRule:
    """The initial distribution of a parameter. If `scale` is 0, all values are `constant`."""

    distribution: str  # "normal" with standard deviation `scale`, or "uniform" on [-scale, scale]
    scale: float
    constant: float = 0.0
    num_used_rows: int | None = None  # the rows from here on are vocabulary padding and become 0; None: no padding


ONES = InitRule("normal", 0.0, constant=1.0)
ZEROS = InitRule("normal", 0.0)


@dataclass(frozen=True)
class ParamSpec:
    """One parameter.

    `dims` names the logical dimension of each dimension of the tensor:
    vocab: padded vocabulary; position: learned positions; bucket: relative distances; embed: d_model;
    heads and kv_heads: (heads or key-value heads) * head_dim; head_index: heads; head_dim: one head;
    ffn: hidden units of the feed-forward layer; expert: experts, each with expert_ffn hidden units; expert_logit: the
    logits of the router, one per expert.
    """

    dims: tuple[str, ...]
    init: InitRule
    decay: bool = True  # whether AdamW and SGD apply weight decay
    muon: bool = False  # whether optim.name=muon updates this parameter by Muon instead of AdamW
    is_embedding: bool = False  # weight decay only with optim.decay_embeddings
    # A tensor-parallel rank applies this replicated parameter to its own heads or tokens only, so its gradient on one
    # rank is a partial sum.
    is_partial_under_tp: bool = False
    # Factors of optim.lr, optim.weight_decay and optim.eps that follow from model.parametrization.
    lr_mult: float = 1.0
    weight_decay_mult: float = 1.0
    eps_mult: float = 1.0


ParamSpecs = Mapping[str, ParamSpec]


@runtime_checkable
class DescribesParams(Protocol):
    """A module that describes its parameters, and those of the submodules that do not describe themselves."""

    def param_specs(self) -> dict[str, ParamSpec]:
        """Return {name of the parameter relative to this module: spec}."""


def collect_param_specs(model: nn.Module) -> dict[str, ParamSpec]:
    """Return {parameter name: spec} of all parameters. Raises ValueError for a parameter that no module describes."""
    specs: dict[str, ParamSpec] = {}
    for path, module in model.named_modules():
        if isinstance(module, DescribesParams):
            prefix = f"{path}." if path else ""
            specs |= {prefix + name: spec for name, spec in module.param_specs().items()}
    for name, parameter in model.named_parameters():
        if name not in specs:
            raise ValueError(
                f"no module describes parameter {name}; add it to `param_specs` of the module that owns it"
            )
        if len(specs[name].dims) != parameter.ndim:
            raise ValueError(f"parameter {name} has {parameter.ndim} dimensions, its ParamSpec {specs[name].dims}")
    return specs


def linear_specs(
    name: str, linear: nn.Linear | None, dims: tuple[str, str], init: InitRule, muon: bool = True
) -> dict[str, ParamSpec]:
    """Describe the weight, with `dims` (outputs, inputs), and the bias of a linear layer."""
    if linear is None:
        return {}
    specs = {f"{name}.weight": ParamSpec(dims, init, muon=muon)}
    if linear.bias is not None:
        specs[f"{name}.bias"] = ParamSpec(dims[:1], ZEROS, decay=False)
    return specs


def norm_specs(name: str, norm: nn.Module | None, dim: str = "embed", by_head: bool = False) -> dict[str, ParamSpec]:
    """Describe the weight and the bias of a normalization layer over `dim`. `by_head`: it normalizes each head."""
    values = {"weight": ZEROS if getattr(norm, "plus_one", False) else ONES, "bias": ZEROS}
    return {
        f"{name}.{key}": ParamSpec((dim,), init, decay=False, is_partial_under_tp=by_head)
        for key, init in values.items()
        if getattr(norm, key, None) is not None
    }


def iter_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of all that a checkpoint stores of a model: its parameters and its buffers."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def list_vocab_params(specs: ParamSpecs) -> list[str]:
    """Return the names of the parameters that have one row per token id."""
    return [name for name, spec in specs.items() if spec.dims[0] == "vocab"]
