"""Every config in configs/ is a run that could start: it loads, fits some world, and says where its corpus is from."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from dist_llm.cli import parser
from dist_llm.config.check import check, resolve
from dist_llm.config.load import load_config
from dist_llm.text.options import options_from

from .commands import REPOSITORY

CONFIGS = sorted((REPOSITORY / "configs").glob("*.yaml"))
RANKS = {"debug": 1, "demo": 2, "gpt2-124m": 8, "gpt2-xl": 16, "llama3-8b": 64, "llama3-70b": 512}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_fits_the_world_it_is_meant_for(path: Path) -> None:
    config, violations = load_config(path)
    assert config is not None
    tokenizer_size = config.model.vocab_size or 4096
    assert violations + check(config, RANKS[path.stem], tokenizer_size) == []
    resolved = resolve(config, RANKS[path.stem], tokenizer_size)
    assert resolved.run.dir == f"runs/{path.stem}"
    assert resolved.data.micro_batch > 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_says_which_command_makes_its_corpus(path: Path) -> None:
    config, _ = load_config(path)
    assert config is not None
    made = {str(options_from(parser().parse_args(arguments)).out) for arguments in prepare_commands(path)}
    assert config.data.path in made


def prepare_commands(path: Path) -> list[list[str]]:
    """The arguments of each `dist-llm prepare` in a config's comments, its base's, and the README."""
    base = yaml.safe_load(path.read_text()).get("base")
    files = [path, REPOSITORY / "README.md", *([path.parent / base] if base else [])]
    found = re.findall(r"dist-llm (prepare .+)", "\n".join(file.read_text() for file in files))
    return [shlex.split(command) for command in found]
