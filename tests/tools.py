"""Run commands of `dist-llm` in the process of a test."""

from collections.abc import Callable

from dist_llm.cli import main


def command(name: str) -> Callable[..., int]:
    """Return a function that runs `dist-llm NAME ARGUMENTS` and returns the exit code."""

    def run(*arguments: object) -> int:
        return main([name, *map(str, arguments)])

    return run
