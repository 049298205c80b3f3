"""Build the engine of a config: the native one, or one that an installed package registers.

An engine's entry point, in the group `dist_llm.engines`, refers to a module or an object with two functions:

build_engine(config, device)    return the `Engine` of a resolved config. A process group exists, even with one rank.
check_config(config, device)    optional: yield a `Violation` for each broken rule, before any process group starts.

Only the selected engine is imported, so a native run needs no packages of the others.
"""

from typing import Any

import torch

from dist_llm.config.engine_names import NATIVE, check_engine_name, find_engine
from dist_llm.config.load import raise_violations
from dist_llm.config.schema import Config
from dist_llm.engines.base import Engine
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import ConfigError


def check_engine_config(config: Config, device: torch.device) -> None:
    """Raise ConfigError if the engine cannot be loaded, or rejects the config on this device."""
    if config.engine != NATIVE and (check_config := getattr(_load(config.engine), "check_config", None)) is not None:
        raise_violations(list(check_config(config, device)))


def build_engine(config: Config, device: torch.device) -> Engine:
    """Build the engine of a resolved config. A process group must exist, except for the native engine on one rank."""
    if config.engine == NATIVE:
        return NativeEngine(config, device)
    engine: Engine = _load(config.engine).build_engine(config, device)
    return engine


def _load(name: str) -> Any:
    """Import the target of an engine's entry point. Raises ConfigError if that fails."""
    raise_violations(list(check_engine_name(name)))
    point = find_engine(name)
    assert point is not None
    try:
        loaded = point.load()
    except Exception as error:  # importing another package can raise anything
        raise ConfigError(
            f"engine: {name}: {point.value} cannot be imported: {type(error).__name__}: {error}; install it again, "
            "or set engine=native"
        ) from error
    if not callable(getattr(loaded, "build_engine", None)):
        raise ConfigError(f"engine: {name}: {point.value} has no function build_engine(config, device)")
    return loaded
