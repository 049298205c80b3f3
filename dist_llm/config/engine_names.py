"""Check the config key `engine`: it names the native engine, or an engine that an installed package registers.

A package registers an engine as an entry point of the group `dist_llm.engines`. `dist_llm/engines/build_engine.py`
describes the object that the entry point refers to. This package registers its engines for DeepSpeed and accelerate in
the same way.
"""

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points

from dist_llm.config.load import Violation

ENTRY_POINT_GROUP = "dist_llm.engines"
NATIVE_ENGINE = "native"
OWN_ENGINES = ("deepspeed", "accelerate")  # registered by this package


def find_engine_plugin(name: str) -> EntryPoint | None:
    """Return the entry point of an engine; None if none is registered."""
    return next(iter(entry_points(group=ENTRY_POINT_GROUP, name=name)), None)


def check_engine_name(name: str) -> Iterator[Violation]:
    """Yield a violation if the engine is not registered, or registered more than once."""
    if name == NATIVE_ENGINE:
        return
    targets = sorted({point.value for point in entry_points(group=ENTRY_POINT_GROUP, name=name)})
    if not targets:
        names = sorted({NATIVE_ENGINE, *entry_points(group=ENTRY_POINT_GROUP).names})
        package = "dist_llm again, whose metadata is older" if name in OWN_ENGINES else "the package that registers it"
        yield Violation(
            ("engine",), f"no installed package has {name}; set one of {', '.join(names)}, or install {package}"
        )
    elif len(targets) > 1:
        yield Violation(
            ("engine",), f"{name} is registered more than once: {', '.join(targets)}; uninstall all but one package"
        )
