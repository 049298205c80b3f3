"""Find and check the classes that installed packages register: mixers, feed-forward layers and objectives.

A package registers a class as an entry point of the group `dist_llm.mixers`, `dist_llm.feedforwards` or
`dist_llm.objectives`. The class derives from `dist_llm/models/mixer.py:Mixer`,
`dist_llm/models/feedforward.py:FeedForward` or `dist_llm/objectives/custom_objective.py:CustomObjective`. Only the
classes that a config names are imported.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from dist_llm.config.feedforward_sections import BUILT_IN_FEEDFORWARDS, RegisteredConfig
from dist_llm.config.load import Violation
from dist_llm.config.model_section import ATTENTION, UnresolvedModelConfig
from dist_llm.config.objective_sections import BUILT_IN_OBJECTIVES, RegisteredObjectiveSpec
from dist_llm.errors import ConfigError

BUILT_IN_NAMES = {
    "dist_llm.mixers": (ATTENTION,),
    "dist_llm.feedforwards": BUILT_IN_FEEDFORWARDS,
    "dist_llm.objectives": BUILT_IN_OBJECTIVES,
}


@dataclass(frozen=True)
class ClassReference:
    """The name of a registered class in a config, and its options."""

    group: str  # of entry points
    name: str
    options: Mapping[str, Any]
    name_key: str  # dotted key of the name
    options_key: str  # dotted key of the section with the options

    def load_class(self) -> Any:
        """Import the class. Raises ConfigError if it is unknown or cannot be imported."""
        return load_registered_class(self.group, self.name)


def list_registered_layers(model: UnresolvedModelConfig) -> list[ClassReference]:
    """Return the registered classes of a layer: those of its mixer and of its feed-forward layer, if not built in."""
    references = []
    if model.mixer != ATTENTION:
        keys = "model.mixer", "model.mixer_options"
        references.append(ClassReference("dist_llm.mixers", model.mixer, model.mixer_options, *keys))
    if isinstance(model.feedforward, RegisteredConfig):
        keys = "model.feedforward.name", "model.feedforward"
        section = model.feedforward
        references.append(ClassReference("dist_llm.feedforwards", section.name, section.options, *keys))
    return references


@cache
def load_registered_class(group: str, name: str) -> Any:
    """Import a class that is registered in a group of entry points. Raises ConfigError if this fails."""
    points = {point.value: point for point in entry_points(group=group, name=name)}
    if not points:
        names = sorted({*BUILT_IN_NAMES[group], *entry_points(group=group).names})
        raise ConfigError(
            f"no installed package has {name}; set one of {', '.join(names)}, or install the package that registers it"
        )
    if len(points) > 1:
        raise ConfigError(f"{name} is registered more than once: {', '.join(sorted(points))}; uninstall all but one")
    ((target, point),) = points.items()
    try:
        return point.load()
    except Exception as error:  # the import of a foreign package can raise any exception
        raise ConfigError(f"{name}: {target} cannot be imported: {type(error).__name__}: {error}") from error


def check_registered_layers(model: UnresolvedModelConfig) -> Iterator[Violation]:
    """Yield violations of the registered classes of a layer, and of their options."""
    if model.mixer == ATTENTION and model.mixer_options:
        yield Violation(
            ("model.mixer_options", "model.mixer"), "has no effect with attention; remove it, or set model.mixer"
        )
    for reference in list_registered_layers(model):
        yield from _check_reference(reference)


def check_registered_objective(spec: RegisteredObjectiveSpec, section: str) -> Iterator[Violation]:
    """Yield violations of a registered objective, which is in the config section `section`, and of its options."""
    yield from _check_reference(
        ClassReference("dist_llm.objectives", spec.name, spec.options, f"{section}.name", section)
    )


def _check_reference(reference: ClassReference) -> Iterator[Violation]:
    try:
        registered_class = reference.load_class()
    except ConfigError as error:
        yield Violation((reference.name_key,), str(error))
        return
    try:
        registered_class.Options.model_validate(reference.options)
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join((reference.options_key, *map(str, detail["loc"])))
            yield Violation((key,), f"{detail['msg'].lower()}, found {detail['input']!r}")


def check_registered_layout(model: UnresolvedModelConfig, tp: int, cp: int) -> Iterator[Violation]:
    """Yield violations of the layout by registered classes. `check_registered_layers` reports the other violations."""
    for reference in list_registered_layers(model):
        if any(_check_reference(reference)):
            continue
        registered_class, name, key = reference.load_class(), reference.name, reference.name_key
        if cp > 1 and not registered_class.supports_context_parallel:
            yield Violation(("parallel.cp", key), f"{name} does not support context parallelism; set cp=1")
        for description, size in registered_class.sharded_sizes(model).items():
            if size % tp:
                yield Violation(("parallel.tp", key), f"{size} {description} of {name} do not divide over tp {tp}")
