"""Each config of configs/families trains, evaluates and generates from the command line."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from . import commands
from .conftest import ONE_PROCESS, Layout

CONFIGS = {path.stem: path for path in sorted((commands.REPOSITORY / "configs" / "families").glob("*.yaml"))}
# The prefix objective is also part of ul2.
FAMILIES = [pytest.param(name, marks=pytest.mark.slow if name in ("fim", "prefix") else ()) for name in CONFIGS]


@pytest.fixture(scope="module")
def trained_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that trains a config of configs/families, once per module, and returns the run directory."""
    runs: dict[str, Path] = {}

    def get_run(family: str) -> Path:
        if family not in runs:
            directory = tmp_path_factory.mktemp(family)
            keys = ("run.dir=run", f"data.path={corpus}", "eval.every=25", "eval.windows=16")
            commands.run("train", "--config", CONFIGS[family], *keys, cwd=directory)
            runs[family] = directory / "run"
        return runs[family]

    return get_run


@pytest.mark.parametrize("family", FAMILIES)
def test_the_heldout_loss_falls(family: str, trained_run: Callable[[str], Path]) -> None:
    rows = [row for row in commands.read_all_rows(trained_run(family)) if "heldout_loss" in row]
    losses = commands.get_column(rows, "heldout_loss")
    assert commands.get_column(rows, "step") == [25, 50, 75, 100]
    assert losses[-1] < losses[0] - 0.05
    assert losses[-1] == min(losses)
    assert ("heldout_bits_per_byte" in rows[-1]) == (family == "causal")
    component_losses = [name for name in rows[-1] if name.startswith("heldout_loss_")]
    assert len(component_losses) == (7 if family == "ul2" else 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluate_uses_the_objective(family: str, trained_run: Callable[[str], Path], tmp_path: Path) -> None:
    one_process = commands.run("evaluate", "--checkpoint", trained_run(family), cwd=tmp_path).stdout
    assert re.search(r"[\d,]+ tokens\nloss \d+\.\d{4} nats per token\nperplexity \d+\.\d+", one_process), one_process
    assert ("loss of 6_prefix" in one_process) == (family == "ul2")
    if family in ("ul2", "encoder-decoder"):
        two_ranks = commands.run("evaluate", "--checkpoint", trained_run(family), ranks=2, cwd=tmp_path).stdout
        assert two_ranks == one_process


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.values != ("encoder",)])
def test_generate_continues_a_prompt(family: str, trained_run: Callable[[str], Path], tmp_path: Path) -> None:
    options = ("--prompt", "import ", "--max-tokens", 12, "--temperature", 0)
    output = commands.run("generate", "--checkpoint", trained_run(family), *options, cwd=tmp_path).stdout
    assert output.startswith("import ")


def test_an_encoder_does_not_generate(trained_run: Callable[[str], Path], tmp_path: Path) -> None:
    completed = commands.run("generate", "--checkpoint", trained_run("encoder"), cwd=tmp_path, succeed=False)
    assert completed.returncode == 2
    assert "cannot generate text with an encoder-only model" in completed.stderr


@pytest.mark.parametrize(
    ("objective", "optimizer"),
    [pytest.param("{name: prefix}", "fresh", marks=pytest.mark.slow), ("{name: span, mode: R}", "keep")],
    ids=["prefix", "span"],
)
def test_another_objective_starts_from_trained_weights(
    objective: str, optimizer: str, uninterrupted_run: Callable[[Layout], Path], corpus: Path, tmp_path: Path
) -> None:
    """Weights of a causal run help another objective from the first step (finding 3 of Wang et al. 2022)."""
    keys = (f"objective={objective}", "run.steps=3")
    allow = "init_allow=[objective,model.vocab_size]"
    adapted = (f"init_from={uninterrupted_run(ONE_PROCESS)}", f"init_optimizer={optimizer}", allow)
    losses = {}
    for name, start in (("fresh", ()), ("adapted", adapted)):
        directory = tmp_path / name
        directory.mkdir()
        run = commands.train(directory, corpus, *keys, *start)
        losses[name] = commands.get_column(commands.read_step_rows(run), "loss")
        assert commands.get_column(commands.read_step_rows(run), "step") == [1, 2, 3]
    assert losses["adapted"][0] < losses["fresh"][0] - 0.5, "the trained weights do not lower the first loss"
    sharded = commands.train(tmp_path, corpus, *keys, *adapted, "parallel.dp_shard=2", ranks=2)
    assert commands.get_column(commands.read_step_rows(sharded), "loss") == pytest.approx(losses["adapted"], rel=1e-4)


def test_debug_shows_the_inputs_of_both_stacks(corpus: Path, tmp_path: Path) -> None:
    completed = commands.run("train", "--debug", CONFIGS["encoder-decoder"], f"data.path={corpus}", cwd=tmp_path)
    assert "the encoder reads:" in completed.stdout
    assert "<sentinel 0>" in completed.stdout
    assert "<start>" in completed.stdout
    assert "debug run passed" in completed.stdout
