"""A run in float8 from the command line writes checkpoints that any other run can use."""

from pathlib import Path

import pytest

from dist_llm.config.load import load_saved_config
from dist_llm.launch.world import World
from dist_llm.parallel import parallelize
from dist_llm.training.evaluate_checkpoint import EvaluationOptions, evaluate_checkpoint
from tests.e2e import commands

FLOAT8 = ("precision=bf16", "fp8=true", "model.n_heads=2", "model.n_kv_heads=2")  # matrix sizes are multiples of 16


@pytest.mark.slow
def test_a_float8_run_is_resumed_and_evaluated_in_bf16(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train on two ranks in float8, then on one process in bf16; evaluate in bf16, which every device supports."""
    run = commands.train(tmp_path, corpus, *FLOAT8, "run.steps=6", ranks=2)
    rows = commands.read_step_rows(run)
    assert load_saved_config(commands.find_latest_checkpoint(run)).fp8
    with monkeypatch.context() as patch_context:
        patch_context.setattr(parallelize, "use_float8_linears", lambda model: pytest.fail("a model in float8"))
        result = evaluate_checkpoint(str(run), data=None, split="heldout", options=EvaluationOptions(), world=World())
    (heldout,) = [row["heldout_loss"] for row in commands.read_all_rows(run) if "heldout_loss" in row]
    assert result.loss == pytest.approx(heldout, rel=5e-3)  # the rounding of float8 after six steps
    assert result.loss != heldout

    resumed_run = commands.train(tmp_path, corpus, *FLOAT8, "run.steps=8", "fp8=false")
    assert resumed_run == run
    assert commands.read_step_rows(run)[: len(rows)] == rows
    assert len(commands.read_step_rows(run)) == 8
