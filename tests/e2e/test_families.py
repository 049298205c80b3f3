"""Every architecture and objective, from the command line: it learns, is evaluated, goes on with a text."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from . import commands
from .conftest import ONE, Layout

CONFIGS = {path.stem: path for path in sorted((commands.REPOSITORY / "configs" / "families").glob("*.yaml"))}
# A prefix is part of ul2, too.
FAMILIES = [pytest.param(name, marks=pytest.mark.slow if name in ("fim", "prefix") else ()) for name in CONFIGS]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each family's run of 100 steps, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            directory = tmp_path_factory.mktemp(family)
            keys = ("run.dir=run", f"data.path={corpus}", "eval.every=25", "eval.windows=16")
            commands.run("train", "--config", CONFIGS[family], *keys, cwd=directory)
            made[family] = directory / "run"
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heldout_loss_falls(family: str, trained: Callable[[str], Path]) -> None:
    rows = [row for row in commands.all_rows(trained(family)) if "heldout_loss" in row]
    losses = commands.column(rows, "heldout_loss")
    assert commands.column(rows, "step") == [25, 50, 75, 100]
    assert losses[-1] < losses[0] - 0.05
    assert losses[-1] == min(losses)
    assert ("heldout_bits_per_byte" in rows[-1]) == (family == "causal")
    parts = [name for name in rows[-1] if name.startswith("heldout_loss_")]
    assert len(parts) == (7 if family == "ul2" else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluate_scores_by_the_objective(family: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    one = commands.run("evaluate", "--checkpoint", trained(family), cwd=tmp_path).stdout
    assert re.search(r"[\d,]+ tokens\nloss \d+\.\d{4} nats per token\nperplexity \d+\.\d+", one), one
    assert ("loss of 6_prefix" in one) == (family == "ul2")
    if family in ("ul2", "encoder-decoder"):
        two = commands.run("evaluate", "--checkpoint", trained(family), ranks=2, cwd=tmp_path).stdout
        assert two == one


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.values != ("encoder",)])
def test_generate_goes_on_with_a_text(family: str, trained: Callable[[str], Path], tmp_path: Path) -> None:
    asked = ("--prompt", "import ", "--max-tokens", 12, "--temperature", 0)
    first = commands.run("generate", "--checkpoint", trained(family), *asked, cwd=tmp_path).stdout
    assert first.startswith("import ")


def test_an_encoder_does_not_generate(trained: Callable[[str], Path], tmp_path: Path) -> None:
    done = commands.run("generate", "--checkpoint", trained("encoder"), cwd=tmp_path, succeed=False)
    assert done.returncode == 2
    assert "cannot generate text with an encoder-only model" in done.stderr


@pytest.mark.parametrize(
    ("objective", "optimizer"),
    [pytest.param("{name: prefix}", "fresh", marks=pytest.mark.slow), ("{name: span, mode: R}", "keep")],
    ids=["prefix", "span"],
)
def test_another_objective_starts_from_trained_weights(
    objective: str, optimizer: str, straight: Callable[[Layout], Path], corpus: Path, tmp_path: Path
) -> None:
    """Finding 3 of Wang et al. 2022 as a command: causal first, then something else, sharded or not."""
    keys = (f"objective={objective}", "run.steps=3")
    allow = "init_allow=[objective,model.vocab_size]"
    adapted = (f"init_from={straight(ONE)}", f"init_optimizer={optimizer}", allow)
    losses = {}
    for name, start in (("fresh", ()), ("adapted", adapted)):
        directory = tmp_path / name
        directory.mkdir()
        run = commands.train(directory, corpus, *keys, *start)
        losses[name] = commands.column(commands.metrics(run), "loss")
        assert commands.column(commands.metrics(run), "step") == [1, 2, 3]
    assert losses["adapted"][0] < losses["fresh"][0] - 0.5, "it knows something from the start"
    sharded = commands.train(tmp_path, corpus, *keys, *adapted, "parallel.dp_shard=2", ranks=2)
    assert commands.column(commands.metrics(sharded), "loss") == pytest.approx(losses["adapted"], rel=1e-4)


def test_debug_shows_what_each_stack_reads(corpus: Path, tmp_path: Path) -> None:
    done = commands.run("train", "--debug", CONFIGS["encoder-decoder"], f"data.path={corpus}", cwd=tmp_path)
    assert "the encoder reads:" in done.stdout
    assert "<sentinel 0>" in done.stdout
    assert "<start>" in done.stdout
    assert "debug run passed" in done.stdout
