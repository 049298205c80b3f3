"""A run resumes, or starts from other weights, only with a model that computes the same; an error says what differs."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from dist_llm.checkpoint.native_weights import NativeWeights
from dist_llm.checkpoint.probe import PROBE_FILE
from dist_llm.config.load import load_saved
from dist_llm.convert.weights import DictWeights
from dist_llm.convert.write_weights import write_native

from . import commands
from .conftest import ONE, Layout

OTHER_MODEL = ("model.norm_order=post", "model.positions=none", "model.n_layers=1")


@pytest.fixture
def run(uninterrupted_run: Callable[[Layout], Path], tmp_path: Path) -> Path:
    """A copy of the uninterrupted run."""
    shutil.copytree(uninterrupted_run(ONE), tmp_path / "run")
    return tmp_path / "run"


def read_contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def run_refused(*arguments: object, cwd: Path) -> str:
    """Run a command that must exit with code 2; return its stderr."""
    completed = commands.run(*arguments, cwd=cwd, succeed=False)
    assert completed.returncode == 2, completed.stderr
    assert "Traceback" not in completed.stderr
    return completed.stderr


def test_a_refused_resume_changes_no_file(run: Path, corpus: Path) -> None:
    contents_before = read_contents(run)
    error = run_refused(*commands.make_train_arguments(corpus, "run.steps=30", *OTHER_MODEL), cwd=run.parent)
    for key in ("norm_order: pre in", "positions: rope in", "n_layers: 2 in"):
        assert f"model.{key} the checkpoint" in error
    assert "init_allow=[model.n_layers,model.positions,model.norm_order]" in error
    assert read_contents(run) == contents_before
    completed = commands.run(
        *commands.make_train_arguments(corpus, "run.steps=22", "model.dropout=0.1"), cwd=run.parent
    )
    assert "model.dropout: 0.0 in the checkpoint, 0.1 in this config; the model's function stays the same" in (
        completed.stdout + completed.stderr
    )


def test_the_error_for_another_model_names_the_fix(run: Path, corpus: Path) -> None:
    start = ("run.dir=next", "run.steps=1", f"init_from={run}")
    error = run_refused(*commands.make_train_arguments(corpus, *start, *OTHER_MODEL), cwd=run.parent)
    assert f"write `model: {{from: {run}/checkpoints/step_00000020}}`" in error
    assert not (run.parent / "next").exists()
    allow = "init_allow=[model.n_layers,model.positions,model.norm_order,model.logit_cap]"
    completed = commands.run(*commands.make_train_arguments(corpus, *start, *OTHER_MODEL, allow), cwd=run.parent)
    output = completed.stdout + completed.stderr
    assert "init_allow: model.n_layers: 2 in the checkpoint, 1 in this config" in output
    assert "parameters of the checkpoint are not used" in output
    assert "model.blocks.1.attention.q.weight" in output
    assert "init_allow: model.logit_cap is the same in the checkpoint" in output
    run_refused(
        *commands.make_train_arguments(corpus, *start, "run.dir=other", "init_allow=[model.n_heads]"), cwd=run.parent
    )


def test_added_parameters_start_from_initial_values(run: Path, corpus: Path) -> None:
    start = ("run.dir=next", "run.steps=1", f"init_from={run}", "model.qk_norm=true", "init_allow=[model.qk_norm]")
    completed = commands.run(*commands.make_train_arguments(corpus, *start), cwd=run.parent)
    assert "keep their initial values: model.blocks.0.attention.norm_k.weight" in completed.stdout + completed.stderr
    error = run_refused(
        *commands.make_train_arguments(corpus, *start, "run.dir=c", "init_optimizer=keep"), cwd=run.parent
    )
    assert "init_optimizer: keep" in error
    assert "blocks.0.attention.norm_k.weight" in error


def test_the_model_section_can_come_from_a_checkpoint(run: Path, corpus: Path) -> None:
    config = run.parent / "next.yaml"
    config.write_text(
        f"run: {{dir: next, steps: 1}}\nmodel: {{from: {run}, dropout: 0.1}}\n"
        f"data: {{path: {corpus}, seq_len: 64, global_batch: 4}}\ninit_from: {run}\n"
    )
    commands.run("train", "--config", config, cwd=run.parent)
    before, after = load_saved(run).model, load_saved(run.parent / "next").model
    assert after == before.model_copy(update={"dropout": 0.1})
    error = run_refused("train", "--config", config, "model.n_layers=3", "model.d_model=32", cwd=run.parent)
    assert f"model.n_layers: 3 differs from model.from: {run} has 2; remove the key, or add model.n_l" in error
    assert f"model.d_model: 32 differs from model.from: {run} has 64; remove the key\n" in error
    error = run_refused("train", "--config", config, "model.from=nowhere", cwd=run.parent)
    assert "1 problem in the config:\n  model.from: nowhere: has no complete checkpoint" in error


def rewrite_checkpoint(checkpoint: Path, change: Callable[[str, Tensor], Tensor], without: str = "") -> None:
    """Rewrite a checkpoint with changed tensors and correct hashes."""
    weights = NativeWeights(checkpoint)
    tensors = {name: change(name, weights.read(name)) for name in weights.shapes}
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.suffix in (".json", ".yaml")}
    for name in ("manifest.json", without):
        files.pop(name, None)
    shutil.rmtree(checkpoint)
    write_native(checkpoint, DictWeights(tensors), files)


def scale_one_weight(name: str, tensor: Tensor) -> Tensor:
    return tensor * 1.5 if name == "model.blocks.1.feedforward.down.weight" else tensor


def test_weights_with_another_probe_loss_are_refused(run: Path, corpus: Path) -> None:
    checkpoint = run / "checkpoints" / "step_00000020"
    rewrite_checkpoint(checkpoint, scale_one_weight)
    before = {name: content for name, content in read_contents(run).items() if not name.startswith("logs")}
    error = run_refused(*commands.make_train_arguments(corpus, "run.steps=30"), cwd=run.parent)
    assert re.search(
        r"do not compute what they computed .* the probe's loss was [\d.]+ and is [\d.]+; 0.0001 of", error
    )
    assert "move this checkpoint away to resume from the previous one; or set checkpoint.probe: warn" in error
    assert {name: content for name, content in read_contents(run).items() if not name.startswith("logs")} == before
    error = run_refused(*commands.make_train_arguments(corpus, "run.dir=next", f"init_from={run}"), cwd=run.parent)
    assert "set init_from to another checkpoint; or set checkpoint.probe: warn" in error
    start = ("run.dir=next", "run.steps=1", f"init_from={run}")
    completed = commands.run(*commands.make_train_arguments(corpus, *start, "checkpoint.probe=warn"), cwd=run.parent)
    assert "do not compute what they computed" in completed.stderr + completed.stdout


def test_a_checkpoint_without_a_probe_is_loaded_with_a_note(run: Path, corpus: Path) -> None:
    rewrite_checkpoint(run / "checkpoints" / "step_00000020", lambda _, tensor: tensor, PROBE_FILE)
    completed = commands.run(*commands.make_train_arguments(corpus, "run.steps=21"), cwd=run.parent)
    assert (completed.stderr + completed.stdout).count("has no probe that this version can compare") == 1
    assert PROBE_FILE in {path.name for path in commands.find_latest_checkpoint(run).iterdir()}


def test_repeated_steps_are_compared_with_the_earlier_ones(corpus: Path, tmp_path: Path) -> None:
    """The loss of one row is changed; only this row is reported, although the resume uses another layout."""
    keys = ("run.steps=8", "checkpoint.every=4")
    run = commands.train(tmp_path, corpus, *keys)
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    changed_rows = [row | {"loss": row["loss"] * 1.001} if row["step"] == 6 and "loss" in row else row for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in changed_rows))
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    completed = commands.run(*commands.make_train_arguments(corpus, *keys), ranks=2, cwd=tmp_path)
    assert "the probe's loss was" in completed.stderr + completed.stdout
    (event,) = [row for row in commands.read_rows(run) if "event" in row]
    assert event["step"] == 6
    assert re.match(r"step 6 had a loss of \d.* before the run was resumed, and now has \d", event["event"])
