"""Build the engine of a config: the native engine, or an engine that an installed package registers.

An entry point in the group `dist_llm.engines` refers to a module or an object with two functions:

build_engine(config, device)    return the `Engine` of a resolved config. A process group exists, even with one rank.
check_config(config, device)    optional: yield a `Violation` for each broken rule. No process group exists yet.

Only the selected engine is imported, so a native run does not need the packages of other engines.
"""

from typing import Any

import torch

from dist_llm.config.engine_names import NATIVE_ENGINE, check_engine_name, find_engine_plugin
from dist_llm.config.load import raise_violations
from dist_llm.config.schema import Config
from dist_llm.engines.base import Engine
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import ConfigError


def check_engine_config(config: Config, device: torch.device) -> None:
    """Raise ConfigError if the engine cannot be loaded, or rejects the config on this device."""
    if (
        config.engine != NATIVE_ENGINE
        and (check_config := getattr(_load_engine(config.engine), "check_config", None)) is not None
    ):
        raise_violations(list(check_config(config, device)))


def build_engine(config: Config, device: torch.device) -> Engine:
    """Build the engine of a resolved config. A process group must exist, except for the native engine on one rank."""
    if config.engine == NATIVE_ENGINE:
        return NativeEngine(config, device)
    engine: Engine = _load_engine(config.engine).build_engine(config, device)
    return engine


def _load_engine(name: str) -> Any:
    """Import the target of the entry point of an engine. Raises ConfigError if the import fails."""
    raise_violations(list(check_engine_name(name)))
    entry_point = find_engine_plugin(name)
    assert entry_point is not None
    try:
        engine_module = entry_point.load()
    except Exception as error:  # the import of a foreign package can raise any exception
        raise ConfigError(
            f"engine: {name}: {entry_point.value} cannot be imported: {type(error).__name__}: {error}; install it "
            "again, or set engine=native"
        ) from error
    if not callable(getattr(engine_module, "build_engine", None)):
        raise ConfigError(f"engine: {name}: {entry_point.value} has no function build_engine(config, device)")
    return engine_module
