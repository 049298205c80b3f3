"""What the end-to-end tests share: one small corpus, and each layout's uninterrupted run."""

import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import commands


@dataclass(frozen=True)
class Layout:
    """How a run is started: ranks of torchrun (0: none) and what is said of them on the command line."""

    ranks: int = 0
    overrides: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "one" if not self.ranks else f"{self.ranks}_ranks_" + "_".join(self.overrides).replace("parallel.", "")


ONE = Layout()
SHARDED = Layout(2, ("parallel.dp_shard=2",))
REPLICATED = Layout(2, ("parallel.dp_replicate=2",))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty files of the standard library, prepared by the command."""
    directory = tmp_path_factory.mktemp("corpus")
    text = directory / "text"
    text.mkdir()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]:
        shutil.copy(file, text)
    arguments = ("--source", "text", "--tokenizer", "bpe:512", "--heldout-fraction", 0.2, "--workers", 2)
    commands.run("prepare", *arguments, "--out", "corpus", cwd=directory)
    return directory / "corpus"


@pytest.fixture(scope="session")
def straight(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Path]:
    """The run of 20 steps without a stop, per layout; made once, only to be read."""
    made: dict[Layout, Path] = {}

    def get(layout: Layout) -> Path:
        if layout not in made:
            directory = tmp_path_factory.mktemp(str(layout).replace("=", ""))
            made[layout] = commands.train(directory, corpus, *layout.overrides, ranks=layout.ranks)
        return made[layout]

    return get
