"""Run the scripts of tools/ in the current process."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

TOOLS = Path(__file__).parents[1] / "tools"


def load_tool(name: str) -> Callable[..., int]:
    """Return a function that runs `python tools/NAME.py ARGUMENTS` in this process and returns the exit code."""
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments: object) -> int:
        before, sys.argv = sys.argv, [f"{name}.py", *map(str, arguments)]
        try:
            return int(module.main())
        finally:
            sys.argv = before

    return run
