"""Parameter groups: the learning rate and weight decay of each parameter, and which parameters are frozen.

A group comes from three sources: the description of the parameter (vectors do not decay, and `model.parametrization`
scales), `optim.groups` (patterns of names), and Muon (matrices of the blocks).
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from dist_llm.config.load import Violation
from dist_llm.config.optim_sections import OptimConfig, OptimKeys, ParamGroup
from dist_llm.param_spec import ParamSpec, ParamSpecs

MAX_NAMES = 6  # maximum number of parameter names in a message


class GroupSettings(NamedTuple):
    """The settings that the parameters of a group share. Groups are sorted by the first two fields."""

    is_muon: bool = False
    is_decay_exempt: bool = False
    lr_mult: float = 1.0
    weight_decay_mult: float = 1.0
    eps_mult: float = 1.0


def find_group(groups: Sequence[ParamGroup], name: str) -> ParamGroup | None:
    """Return the first group whose pattern matches the parameter name; None: no group."""
    return next((group for group in groups if fnmatchcase(name, group.pattern)), None)


def is_frozen(config: OptimKeys, name: str) -> bool:
    """Return whether `optim.groups` freezes the parameter."""
    group = find_group(config.groups, name)
    return group is not None and group.freeze


def freeze_parameters(config: OptimKeys, model: nn.Module) -> None:
    """Set requires_grad to False for the frozen parameters of a model, whose names are those of the full model."""
    for name, parameter in model.named_parameters():
        if is_frozen(config, name):
            parameter.requires_grad_(False)


def build_param_groups(
    config: OptimConfig,
    parameters: Iterable[tuple[str, nn.Parameter]],
    specs: ParamSpecs,
    muon_names: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Return the parameter groups of a torch optimizer: weight decay, no weight decay, Muon.

    The learning rate of a group in a step is that of the schedule times the entry "lr_mult" of the group. Frozen
    parameters are in no group. A pipeline stage whose parameters are all frozen has one empty group.
    """
    by_settings: dict[GroupSettings, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in parameters:
        if not is_frozen(config, name):
            by_settings[_get_settings(config, name, specs[name], is_muon=name in muon_names)].append(parameter)
    no_parameters: dict[GroupSettings, list[nn.Parameter]] = {GroupSettings(): []}
    ordered = sorted((by_settings or no_parameters).items(), key=lambda item: item[0][:2])
    return [{"params": group_params, **_to_options(config, settings)} for settings, group_params in ordered]


def decays(config: OptimKeys, spec: ParamSpec) -> bool:
    """Return whether weight decay applies to a parameter.

    Vectors (norms and biases) have no weight decay. Embeddings have weight decay if `decay_embeddings` is set. A tied
    head is an embedding.
    """
    return spec.decay and (config.decay_embeddings or not spec.is_embedding)


def find_group_violations(config: OptimKeys, specs: ParamSpecs) -> Iterator[Violation]:
    """Yield violations of `optim.groups` for a model with these parameters."""
    matches: list[list[str]] = [[] for _ in config.groups]
    for name in specs:
        group = find_group(config.groups, name)
        if group is not None:
            matches[config.groups.index(group)].append(name)
    for index, (group, names) in enumerate(zip(config.groups, matches, strict=True)):
        section = f"optim.groups.{index}"
        if not any(fnmatchcase(name, group.pattern) for name in specs):
            yield Violation(
                (f"{section}.pattern",), f"{group.pattern} matches no parameter; names are {_format_names(list(specs))}"
            )
        elif not names:
            yield Violation(
                (f"{section}.pattern",),
                f"earlier groups match all parameters that {group.pattern} matches; move this group before them",
            )
        elif group.weight_decay_mult != 1 and not any(decays(config, specs[name]) for name in names):
            yield Violation(
                (f"{section}.weight_decay_mult",),
                f"weight decay does not apply to the parameters that {group.pattern} matches ({_format_names(names)}); "
                "remove it, or set optim.decay_embeddings for embeddings",
            )
    if all(is_frozen(config, name) for name in specs):
        yield Violation(("optim.groups",), "all parameters are frozen; remove `freeze` from a group")


def _get_settings(config: OptimKeys, name: str, spec: ParamSpec, *, is_muon: bool) -> GroupSettings:
    group = find_group(config.groups, name) or ParamGroup(pattern=name)
    is_decay_exempt = not decays(config, spec)
    weight_decay_mult = 1.0 if is_decay_exempt else spec.weight_decay_mult * group.weight_decay_mult
    return GroupSettings(
        is_muon=is_muon,
        is_decay_exempt=is_decay_exempt,
        lr_mult=spec.lr_mult * group.lr_mult,
        weight_decay_mult=weight_decay_mult,
        eps_mult=spec.eps_mult,
    )


def _to_options(config: OptimConfig, settings: GroupSettings) -> dict[str, Any]:
    """Return the entries of a parameter group of torch, apart from its parameters."""
    weight_decay = 0.0 if settings.is_decay_exempt else config.weight_decay * settings.weight_decay_mult
    options: dict[str, Any] = {"weight_decay": weight_decay, "lr_mult": settings.lr_mult}
    if config.name == "muon" and settings.is_muon:
        options["momentum"] = config.muon_momentum
    if config.name != "sgd":
        options["eps"] = config.eps * settings.eps_mult
    return options


def _format_names(names: Sequence[str]) -> str:
    """Format some of the names, of different modules."""
    if len(names) <= MAX_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[: MAX_NAMES - 1])}, ..., {names[-1]}"
