"""Every config in configs/ is valid: it loads, fits a world size, and names the command that prepares its corpus."""

import math
import re
import shlex
from pathlib import Path

import pytest
import yaml

from dist_llm.cli import build_parser
from dist_llm.config.check import check
from dist_llm.config.derive import AXES, resolve_config
from dist_llm.config.load import load_config
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.text.options import build_options

from .commands import REPOSITORY

FOLDER = REPOSITORY / "configs"
CONFIGS = {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}
RANKS = {
    **{"debug": 1, "demo": 2, "demo-moe": 2, "gpt2-124m": 8, "gpt2-xl": 16, "llama3-8b": 64, "llama3-70b": 512},
    **{"mixtral-8x7b": 64, "qwen3-30b-a3b": 64, "gpt-oss-120b": 128},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_fits_its_world_size(name: str) -> None:
    config, violations = load_config(CONFIGS[name])
    assert config is not None
    ranks = RANKS[name] if name in RANKS else count_ranks(config)
    tokenizer_size = config.model.vocab_size or 4096
    assert violations + check(config, ranks, tokenizer_size) == []
    resolved = resolve_config(config, ranks, tokenizer_size)
    assert resolved.run.dir == f"runs/{name}"
    assert resolved.data.micro_batch > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_names_the_command_that_prepares_its_corpus(name: str) -> None:
    config, _ = load_config(CONFIGS[name])
    assert config is not None
    prepared_corpora = {
        str(build_options(build_parser().parse_args(arguments)).out)
        for arguments in find_prepare_commands(CONFIGS[name])
    }
    assert config.data.path in prepared_corpora


def count_ranks(config: UnresolvedConfig) -> int:
    """Return the number of ranks of the layout; null (derived from the world size) counts as one."""
    return math.prod(getattr(config.parallel, axis) or 1 for axis in AXES)


def find_prepare_commands(path: Path) -> list[list[str]]:
    """Return the arguments of each `dist-llm prepare` in the README and in the comments of a config and its base."""
    base = yaml.safe_load(path.read_text()).get("base")
    files = [path, REPOSITORY / "README.md", *([path.parent / base] if base else [])]
    prepare_lines = re.findall(r"dist-llm (prepare .+)", "\n".join(file.read_text() for file in files))
    return [shlex.split(command) for command in prepare_lines]
