"""Check the config key `model.mixer`: attention, or a mixer that an installed package registers.

A package registers a mixer as an entry point of the group `dist_llm.mixers`, which refers to a class that derives from
`dist_llm/models/mixer.py:Mixer`. Only the mixers that a config names are imported.
"""

from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from pydantic import ValidationError

from dist_llm.config.load import Violation
from dist_llm.config.model_section import ATTENTION, UnresolvedModelConfig
from dist_llm.errors import ConfigError

ENTRY_POINT_GROUP = "dist_llm.mixers"


@cache
def load_mixer(name: str) -> Any:
    """Import the class of a registered mixer. Raises ConfigError if it is unknown or cannot be imported."""
    points = {point.value: point for point in entry_points(group=ENTRY_POINT_GROUP, name=name)}
    if not points:
        names = sorted({ATTENTION, *entry_points(group=ENTRY_POINT_GROUP).names})
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


def check_mixer(model: UnresolvedModelConfig) -> Iterator[Violation]:
    """Yield violations of the mixer of a layer and of its options."""
    if model.mixer == ATTENTION:
        if model.mixer_options:
            yield Violation(
                ("model.mixer_options", "model.mixer"), "has no effect with attention; remove it, or set model.mixer"
            )
        return
    try:
        mixer = load_mixer(model.mixer)
    except ConfigError as error:
        yield Violation(("model.mixer",), str(error))
        return
    try:
        mixer.Options.model_validate(model.mixer_options)
    except ValidationError as error:
        for detail in error.errors():
            key = ".".join(("model.mixer_options", *map(str, detail["loc"])))
            yield Violation((key,), f"{detail['msg'].lower()}, found {detail['input']!r}")


def check_mixer_layout(model: UnresolvedModelConfig, tp: int, cp: int) -> Iterator[Violation]:
    """Yield violations of the layout by a registered mixer. `check_mixer` reports a mixer that cannot be imported."""
    if model.mixer == ATTENTION or any(check_mixer(model)):
        return
    mixer = load_mixer(model.mixer)
    if cp > 1 and not mixer.supports_context_parallel:
        yield Violation(("parallel.cp", "model.mixer"), f"{model.mixer} does not support context parallelism; set cp=1")
    for description, size in mixer.sharded_sizes(model).items():
        if size % tp:
            yield Violation(
                ("parallel.tp", "model.mixer"), f"{size} {description} of {model.mixer} do not divide over tp {tp}"
            )
