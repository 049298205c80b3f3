"""Fixtures of the end-to-end tests: one small corpus, and an uninterrupted run for each layout.

def test_a_resumed_run_has_equal_losses(corpus, uninterrupted_run, tmp_path):
    run = commands.train(tmp_path, corpus, *SHARDED.overrides, ranks=SHARDED.ranks)
    assert_same_metrics(run, uninterrupted_run(SHARDED))
"""

import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import commands


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The number of ranks (0: one process without torchrun) and the overrides on the command line.

    `name` replaces the overrides in the id of a test.
    """

    ranks: int = 0
    overrides: tuple[str, ...] = ()
    name: str = ""

    def __str__(self) -> str:
        if self.name:
            return self.name
        return "one" if not self.ranks else f"{self.ranks}_ranks_" + "_".join(self.overrides).replace("parallel.", "")


ONE_PROCESS = Layout()
SHARDED = Layout(ranks=2, overrides=("parallel.dp_shard=2",))
EXPERTS = Layout(
    ranks=2,
    overrides=(
        "parallel.ep=2",
        "model.feedforward={name: moe, n_experts: 4, top_k: 2, d_expert: 64, selection_bias: true, balance_loss: 0.1, "
        "balance_over: previous_step}",
    ),
    name="experts_on_2_ranks",
)
REPLICATED = Layout(ranks=2, overrides=("parallel.dp_replicate=2",))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of forty files of the standard library, prepared by `dist-llm prepare`."""
    directory = tmp_path_factory.mktemp("corpus")
    text = directory / "text"
    text.mkdir()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]:
        shutil.copy(file, text)
    arguments = ("--source", "text", "--tokenizer", "bpe:512", "--heldout-fraction", 0.2, "--workers", 2)
    commands.run("prepare", *arguments, "--out", "corpus", cwd=directory)
    return directory / "corpus"


@pytest.fixture(scope="session")
def uninterrupted_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Path]:
    """Return a function that trains 20 steps in a layout, once per session, and returns the run directory.

    Tests must not change the run.
    """
    runs: dict[Layout, Path] = {}

    def get_run(layout: Layout) -> Path:
        if layout not in runs:
            directory = tmp_path_factory.mktemp(str(layout).replace("=", ""))
            runs[layout] = commands.train(directory, corpus, *layout.overrides, ranks=layout.ranks)
        return runs[layout]

    return get_run
