"""The actions of `dist-llm convert` and `dist-llm data` name functions that take the arguments they parse."""

import argparse
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_llm import cli
from dist_llm.commands import convert_checkpoint, inspect_data
from dist_llm.commands.call_function import resolve_function
from dist_llm.commands.run_data import select_corpora
from dist_llm.errors import DataError

REPOSITORY = Path(__file__).parents[2]


def iter_actions() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield name and parser of each action of the subcommands `convert` and `data`."""
    for module in (convert_checkpoint, inspect_data):
        parser = argparse.ArgumentParser()
        module.add_arguments(parser)
        (group,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        yield from group.choices.items()


ACTIONS = list(iter_actions())


@pytest.mark.parametrize(
    ("name", "parser"), ACTIONS, ids=[f"{index} {name}" for index, (name, _) in enumerate(ACTIONS)]
)
def test_the_function_of_an_action_takes_its_arguments_and_defaults(name: str, parser: argparse.ArgumentParser) -> None:
    parameters = inspect.signature(resolve_function(parser.get_default("function"))).parameters
    arguments = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert parameters.keys() == arguments.keys()
    for dest, parameter in parameters.items():
        if arguments[dest].option_strings and not arguments[dest].required:
            assert (arguments[dest].default or None) == (parameter.default or None), dest
        else:
            assert parameter.default in (inspect.Parameter.empty, None), dest


@pytest.mark.parametrize("command", ["convert", "data"])
def test_an_unknown_action_is_a_user_error(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as excinfo:
        cli.main([command, "to-nowhere"])
    assert excinfo.value.code == 2
    assert "to-nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(("script", "action"), [("convert_checkpoint", "to-hf"), ("inspect_data", "stats")])
def test_the_scripts_of_tools_are_aliases_of_commands(script: str, action: str) -> None:
    completed = subprocess.run(
        [sys.executable, f"tools/{script}.py", action, "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    assert f"dist-llm {'convert' if action == 'to-hf' else 'data'} {action}" in completed.stdout


def test_corpora_come_either_from_the_command_line_or_from_a_run(tmp_path: Path) -> None:
    for corpora, run in (((), None), ((tmp_path,), tmp_path)):
        with pytest.raises(DataError, match="give either corpora or a run"):
            select_corpora(corpora, run)
