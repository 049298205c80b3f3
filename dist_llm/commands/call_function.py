"""Call the function that a parsed command names, with its arguments as keywords."""

import argparse
from collections.abc import Callable
from importlib import import_module


def call_function(options: argparse.Namespace) -> int:
    """Import and call `options.function` (`module:function`). Returns its exit code; None is 0."""
    arguments = {name: value for name, value in vars(options).items() if name not in ("command", "action", "function")}
    return resolve_function(options.function)(**arguments) or 0


def resolve_function(name: str) -> Callable[..., int | None]:
    """Import the function `module:function`."""
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)
