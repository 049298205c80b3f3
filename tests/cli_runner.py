"""Run subcommands of `dist-llm` in the process of a test.

    convert = make_cli_runner("convert")
    assert convert("to-hf", checkpoint, tmp_path / "hf") == 0  # as `dist-llm convert to-hf ...`

Tests that need a process of their own use tests/e2e/commands.py.
"""

from collections.abc import Callable

from dist_llm.cli import main


def make_cli_runner(subcommand: str) -> Callable[..., int]:
    """Return a function that runs `dist-llm SUBCOMMAND ARGUMENTS` and returns the exit code."""

    def run(*arguments: object) -> int:
        return main([subcommand, *map(str, arguments)])

    return run
