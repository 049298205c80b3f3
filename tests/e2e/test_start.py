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
from dist_llm.config.load import load_saved_config
from dist_llm.convert.weights import DictWeights
from dist_llm.convert.write_weights import write_native

from . import commands
from .conftest import ONE_PROCESS, Layout

OTHER_MODEL_OVERRIDES = ("model.norm_order=post", "model.positions=none", "model.n_layers=1")


@pytest.fixture
def run_dir(uninterrupted_run: Callable[[Layout], Path], tmp_path: Path) -> Path:
    """A copy of the directory of the uninterrupted run."""
    shutil.copytree(uninterrupted_run(ONE_PROCESS), tmp_path / "run")
    return tmp_path / "run"


def read_contents(directory: Path) -> dict[str, bytes]:
    """Return the content of all files below a directory by relative path."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def run_refused(*arguments: object, cwd: Path) -> str:
    """Run a command that must exit with code 2; return its stderr."""
    completed = commands.run(*arguments, cwd=cwd, succeed=False)
    assert completed.returncode == 2, completed.stderr
    assert "Traceback" not in completed.stderr
    return completed.stderr


def test_a_refused_resume_changes_no_file(run_dir: Path, corpus: Path) -> None:
    contents_before = read_contents(run_dir)
    error = run_refused(
        *commands.make_train_arguments(corpus, "run.steps=30", *OTHER_MODEL_OVERRIDES), cwd=run_dir.parent
    )
    for key in ("norm_order: pre in", "positions: rope in", "n_layers: 2 in"):
        assert f"model.{key} the checkpoint" in error
    assert "init_allow=[model.n_layers,model.positions,model.norm_order]" in error
    assert read_contents(run_dir) == contents_before
    completed = commands.run(
        *commands.make_train_arguments(corpus, "run.steps=22", "model.dropout=0.1"), cwd=run_dir.parent
    )
    assert "model.dropout: 0.0 in the checkpoint, 0.1 in this config; the model's function stays the same" in (
        completed.stdout + completed.stderr
    )


def test_the_error_for_another_model_names_the_fix(run_dir: Path, corpus: Path) -> None:
    start_overrides = ("run.dir=next", "run.steps=1", f"init_from={run_dir}")
    error = run_refused(
        *commands.make_train_arguments(corpus, *start_overrides, *OTHER_MODEL_OVERRIDES), cwd=run_dir.parent
    )
    assert f"write `model: {{from: {run_dir}/checkpoints/step_00000020}}`" in error
    assert not (run_dir.parent / "next").exists()
    allow_override = "init_allow=[model.n_layers,model.positions,model.norm_order,model.logit_cap]"
    completed = commands.run(
        *commands.make_train_arguments(corpus, *start_overrides, *OTHER_MODEL_OVERRIDES, allow_override),
        cwd=run_dir.parent,
    )
    output = completed.stdout + completed.stderr
    assert "init_allow: model.n_layers: 2 in the checkpoint, 1 in this config" in output
    assert "parameters of the checkpoint are not used" in output
    assert "model.blocks.1.attention.q.weight" in output
    assert "init_allow: model.logit_cap is the same in the checkpoint" in output
    # The shapes of parameters depend on n_heads, so init_from cannot change it.
    error = run_refused(
        *commands.make_train_arguments(corpus, *start_overrides, "run.dir=other", "init_allow=[model.n_heads]"),
        cwd=run_dir.parent,
    )
    assert "init_allow: model.n_heads is not a key that init_from can change" in error


def test_added_parameters_start_from_initial_values(run_dir: Path, corpus: Path) -> None:
    start_overrides = (
        "run.dir=next",
        "run.steps=1",
        f"init_from={run_dir}",
        "model.qk_norm=true",
        "init_allow=[model.qk_norm]",
    )
    completed = commands.run(*commands.make_train_arguments(corpus, *start_overrides), cwd=run_dir.parent)
    assert "keep their initial values: model.blocks.0.attention.norm_k.weight" in completed.stdout + completed.stderr
    error = run_refused(
        *commands.make_train_arguments(corpus, *start_overrides, "run.dir=c", "init_optimizer=keep"), cwd=run_dir.parent
    )
    assert "init_optimizer: keep" in error
    assert "blocks.0.attention.norm_k.weight" in error


def test_the_model_section_can_come_from_a_checkpoint(run_dir: Path, corpus: Path) -> None:
    config = run_dir.parent / "next.yaml"
    config.write_text(
        f"run: {{dir: next, steps: 1}}\nmodel: {{from: {run_dir}, dropout: 0.1}}\n"
        f"data: {{path: {corpus}, seq_len: 64, global_batch: 4}}\ninit_from: {run_dir}\n"
    )
    commands.run("train", "--config", config, cwd=run_dir.parent)
    before, after = load_saved_config(run_dir).model, load_saved_config(run_dir.parent / "next").model
    assert after == before.model_copy(update={"dropout": 0.1})
    error = run_refused("train", "--config", config, "model.n_layers=3", "model.d_model=32", cwd=run_dir.parent)
    differs_from = f"differs from model.from: {run_dir} has"
    assert f"model.n_layers: 3 {differs_from} 2; remove the key, or add model.n_layers to init_allow\n" in error
    assert f"model.d_model: 32 {differs_from} 64; remove the key\n" in error
    error = run_refused("train", "--config", config, "model.from=nowhere", cwd=run_dir.parent)
    assert "1 problem in the config:\n  model.from: nowhere: has no complete checkpoint" in error


def rewrite_checkpoint(checkpoint: Path, change: Callable[[str, Tensor], Tensor], omitted_file: str = "") -> None:
    """Rewrite a checkpoint with changed tensors and correct hashes, without `omitted_file`."""
    weights = NativeWeights(checkpoint)
    tensors = {name: change(name, weights.read(name)) for name in weights.shapes}
    files = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.suffix in (".json", ".yaml")}
    for name in ("manifest.json", omitted_file):
        files.pop(name, None)
    shutil.rmtree(checkpoint)
    write_native(checkpoint, DictWeights(tensors), files)


def scale_one_weight(name: str, tensor: Tensor) -> Tensor:
    """Return the tensor, scaled if it is one certain weight of the second block."""
    return tensor * 1.5 if name == "model.blocks.1.feedforward.down.weight" else tensor


def test_weights_with_another_probe_loss_are_refused(run_dir: Path, corpus: Path) -> None:
    checkpoint = run_dir / "checkpoints" / "step_00000020"
    rewrite_checkpoint(checkpoint, scale_one_weight)
    before = {name: content for name, content in read_contents(run_dir).items() if not name.startswith("logs")}
    error = run_refused(*commands.make_train_arguments(corpus, "run.steps=30"), cwd=run_dir.parent)
    assert re.search(
        r"do not compute what they computed .* the probe's loss was [\d.]+ and is [\d.]+; 0\.0001 of it is allowed",
        error,
    )
    assert "move this checkpoint away to resume from the previous one; or set checkpoint.probe: warn" in error
    assert {name: content for name, content in read_contents(run_dir).items() if not name.startswith("logs")} == before
    error = run_refused(
        *commands.make_train_arguments(corpus, "run.dir=next", f"init_from={run_dir}"), cwd=run_dir.parent
    )
    assert "set init_from to another checkpoint; or set checkpoint.probe: warn" in error
    start_overrides = ("run.dir=next", "run.steps=1", f"init_from={run_dir}")
    completed = commands.run(
        *commands.make_train_arguments(corpus, *start_overrides, "checkpoint.probe=warn"), cwd=run_dir.parent
    )
    assert "do not compute what they computed" in completed.stderr + completed.stdout


def test_a_checkpoint_without_a_probe_is_loaded_with_a_note(run_dir: Path, corpus: Path) -> None:
    rewrite_checkpoint(run_dir / "checkpoints" / "step_00000020", lambda _, tensor: tensor, omitted_file=PROBE_FILE)
    completed = commands.run(*commands.make_train_arguments(corpus, "run.steps=21"), cwd=run_dir.parent)
    # The resume looks for a probe in the checkpoint. The checkpoint that it writes has one.
    assert (completed.stderr + completed.stdout).count("has no probe that this version can compare") == 1
    assert PROBE_FILE in {path.name for path in commands.find_latest_checkpoint(run_dir).iterdir()}


def test_repeated_steps_are_compared_with_the_earlier_ones(corpus: Path, tmp_path: Path) -> None:
    """The loss of one row is changed; only this row is reported, although the resume uses another layout."""
    overrides = ("run.steps=8", "checkpoint.every=4")
    run_dir = commands.train(tmp_path, corpus, *overrides)
    metrics = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    changed_rows = [row | {"loss": row["loss"] * 1.001} if row["step"] == 6 and "loss" in row else row for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in changed_rows))
    shutil.rmtree(run_dir / "checkpoints" / "step_00000008")
    completed = commands.run(*commands.make_train_arguments(corpus, *overrides), ranks=2, cwd=tmp_path)
    # The weights of step 4 are unchanged, so their probe agrees. Only then does the run repeat steps.
    assert "the probe's loss was" in completed.stderr + completed.stdout
    (event,) = [row for row in commands.read_all_rows(run_dir) if "event" in row]
    assert event["step"] == 6
    assert re.match(r"step 6 had a loss of \d.* before the run was resumed, and now has \d", event["event"])
