"""Commands of `dist-llm`, run in this process."""

from collections.abc import Callable

from dist_llm.cli import main


def command(name: str) -> Callable[..., int]:
    """A function that runs `dist-llm NAME ARGUMENTS` and returns its exit code."""

    def run(*arguments: object) -> int:
        return main([name, *map(str, arguments)])

    return run
