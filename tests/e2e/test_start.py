"""A run goes on, or starts from another's weights, with the model of the checkpoint, or it says why not."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_llm.config.load import load_saved

from . import commands
from .conftest import ONE, Layout

WRONG = ("model.rope_theta=500000.0", "model.norm_order=post", "model.positions=none", "model.n_layers=1")


@pytest.fixture
def run(straight: Callable[[Layout], Path], tmp_path: Path) -> Path:
    """A copy of the run of 20 steps."""
    shutil.copytree(straight(ONE), tmp_path / "run")
    return tmp_path / "run"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def refused(*arguments: object, cwd: Path) -> str:
    done = commands.run(*arguments, cwd=cwd, succeed=False)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_resume_with_another_model_changes_nothing_on_the_disk(run: Path, corpus: Path) -> None:
    before = contents(run)
    error = refused(*commands.train_arguments(corpus, "run.steps=30", *WRONG), cwd=run.parent)
    for key in ("rope_theta: 10000.0 in", "norm_order: pre in", "positions: rope in", "n_layers: 2 in"):
        assert f"model.{key} the checkpoint" in error
    assert "init_allow=[model.n_layers,model.positions,model.rope_theta,model.norm_order]" in error
    assert contents(run) == before
    done = commands.run(*commands.train_arguments(corpus, "run.steps=22", "model.dropout=0.1"), cwd=run.parent)
    assert "model.dropout: 0.0 in the checkpoint, 0.1 in this config; the model's function stays the same" in (
        done.stdout + done.stderr
    )


def test_a_start_with_another_model_names_what_to_do(run: Path, corpus: Path) -> None:
    start = ("run.dir=next", "run.steps=1", f"init_from={run}")
    error = refused(*commands.train_arguments(corpus, *start, *WRONG), cwd=run.parent)
    assert f"write `model: {{from: {run}/checkpoints/step_00000020}}`" in error
    assert not (run.parent / "next").exists()
    allow = "init_allow=[model.n_layers,model.positions,model.rope_theta,model.norm_order,model.logit_cap]"
    done = commands.run(*commands.train_arguments(corpus, *start, *WRONG, allow), cwd=run.parent)
    said = done.stdout + done.stderr
    assert "init_allow: model.n_layers: 2 in the checkpoint, 1 in this config" in said
    assert "parameters of the checkpoint are not used" in said
    assert "model.blocks.1.attention.q.weight" in said
    assert "init_allow: model.logit_cap is the same in the checkpoint" in said
    refused(*commands.train_arguments(corpus, *start, "run.dir=other", "init_allow=[model.n_heads]"), cwd=run.parent)


def test_added_parameters_begin_with_initial_values(run: Path, corpus: Path) -> None:
    start = ("run.dir=next", "run.steps=1", f"init_from={run}", "model.qk_norm=true", "init_allow=[model.qk_norm]")
    done = commands.run(*commands.train_arguments(corpus, *start), cwd=run.parent)
    assert "keep their initial values: model.blocks.0.attention.norm_k.weight" in done.stdout + done.stderr
    error = refused(*commands.train_arguments(corpus, *start, "run.dir=c", "init_optimizer=keep"), cwd=run.parent)
    assert "init_optimizer: keep" in error
    assert "blocks.0.attention.norm_k.weight" in error


def test_the_model_is_taken_from_a_checkpoint(run: Path, corpus: Path) -> None:
    config = run.parent / "next.yaml"
    config.write_text(
        f"run: {{dir: next, steps: 1}}\nmodel: {{from: {run}, dropout: 0.1}}\n"
        f"data: {{path: {corpus}, seq_len: 64, global_batch: 4}}\ninit_from: {run}\n"
    )
    commands.run("train", "--config", config, cwd=run.parent)
    before, after = load_saved(run).model, load_saved(run.parent / "next").model
    assert after == before.model_copy(update={"dropout": 0.1})
    error = refused("train", "--config", config, "model.n_layers=3", "model.d_model=32", cwd=run.parent)
    assert f"model.n_layers: 3 stands beside model.from, but {run} has 2; remove the key, or add model.n_l" in error
    assert f"model.d_model: 32 stands beside model.from, but {run} has 64; remove the key\n" in error
    error = refused("train", "--config", config, "model.from=nowhere", cwd=run.parent)
    assert "1 problem in the config:\n  model.from: nowhere: holds no complete checkpoint" in error
