"""A run goes on, or starts from another's weights, with the model of the checkpoint, or it says why not."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.checkpoint.probe import PROBE
from dist_llm.config.load import load_saved
from dist_llm.convert.weights import DictWeights
from dist_llm.convert.write_weights import write_native

from . import commands
from .conftest import ONE, Layout

WRONG = ("model.norm_order=post", "model.positions=none", "model.n_layers=1")


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
    for key in ("norm_order: pre in", "positions: rope in", "n_layers: 2 in"):
        assert f"model.{key} the checkpoint" in error
    assert "init_allow=[model.n_layers,model.positions,model.norm_order]" in error
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
    allow = "init_allow=[model.n_layers,model.positions,model.norm_order,model.logit_cap]"
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


def rewrite(checkpoint: Path, change: Callable[[str, Tensor], Tensor], without: str = "") -> None:
    """The same checkpoint with other tensors, every hash right."""
    weights = NativeWeights(checkpoint)
    tensors = {name: change(name, weights.read(name)) for name in weights.shapes}
    files = {each.name: each.read_bytes() for each in checkpoint.iterdir() if each.suffix in (".json", ".yaml")}
    for name in ("manifest.json", without):
        files.pop(name, None)
    shutil.rmtree(checkpoint)
    write_native(checkpoint, DictWeights(tensors), files)


def scaled(name: str, tensor: Tensor) -> Tensor:
    return tensor * 1.5 if name == "model.blocks.1.feedforward.down.weight" else tensor


def test_weights_that_compute_something_else_are_refused(run: Path, corpus: Path) -> None:
    checkpoint = run / "checkpoints" / "step_00000020"
    rewrite(checkpoint, scaled)
    before = {name: content for name, content in contents(run).items() if not name.startswith("logs")}
    error = refused(*commands.train_arguments(corpus, "run.steps=30"), cwd=run.parent)
    assert re.search(
        r"do not compute what they computed .* the probe's loss was [\d.]+ and is [\d.]+; 0.0001 of", error
    )
    assert "set checkpoint.probe: warn" in error
    assert {name: content for name, content in contents(run).items() if not name.startswith("logs")} == before
    refused(*commands.train_arguments(corpus, "run.dir=next", f"init_from={run}"), cwd=run.parent)
    start = ("run.dir=next", "run.steps=1", f"init_from={run}")
    done = commands.run(*commands.train_arguments(corpus, *start, "checkpoint.probe=warn"), cwd=run.parent)
    assert "do not compute what they computed" in done.stderr + done.stdout


def test_a_checkpoint_without_a_probe_is_loaded_with_a_line(run: Path, corpus: Path) -> None:
    rewrite(run / "checkpoints" / "step_00000020", lambda _, tensor: tensor, PROBE)
    done = commands.run(*commands.train_arguments(corpus, "run.steps=21"), cwd=run.parent)
    assert (done.stderr + done.stdout).count("has no probe that this version can compare") == 1
    assert PROBE in {path.name for path in commands.newest(run).iterdir()}


def test_steps_that_a_kill_took_back_are_compared(corpus: Path, tmp_path: Path) -> None:
    """The loss of one row is changed: it alone is told, and the steps around it are the same on another layout."""
    keys = ("run.steps=8", "checkpoint.every=4")
    run = commands.train(tmp_path, corpus, *keys)
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    odd = [row | {"loss": row["loss"] * 1.001} if row["step"] == 6 and "loss" in row else row for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in odd))
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    done = commands.run(*commands.train_arguments(corpus, *keys), ranks=2, cwd=tmp_path)
    assert "the probe's loss was" in done.stderr + done.stdout
    (event,) = [row for row in commands.all_rows(run) if "event" in row]
    assert event["step"] == 6
    assert re.match(r"step 6 was taken before the run was resumed, with a loss of \d.*; now it is \d", event["event"])
