"""The names that `engine` may have: the native engine, and those that installed packages register.

A package registers an engine as an entry point of the group `dist_llm.engines`; `dist_llm/engines/build_engine.py` says
what the entry point refers to. DeepSpeed's and accelerate's engines are registered by this package in the same way.
"""

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points

from dist_llm.config.load import Violation

GROUP = "dist_llm.engines"
NATIVE = "native"
OWN = ("deepspeed", "accelerate")  # registered by this package


def find_engine(name: str) -> EntryPoint | None:
    """Return the entry point of an engine; None if none is registered."""
    return next(iter(entry_points(group=GROUP, name=name)), None)


def check_engine_name(name: str) -> Iterator[Violation]:
    """Yield a violation if the engine is not registered, or registered more than once."""
    if name == NATIVE:
        return
    targets = sorted({point.value for point in entry_points(group=GROUP, name=name)})
    if not targets:
        names = sorted({NATIVE, *entry_points(group=GROUP).names})
        package = "dist_llm again, whose metadata is older" if name in OWN else "the package that registers it"
        yield Violation(
            ("engine",), f"no installed package has {name}; set one of {', '.join(names)}, or install {package}"
        )
    elif len(targets) > 1:
        yield Violation(
            ("engine",), f"{name} is registered more than once: {', '.join(targets)}; uninstall all but one package"
        )
