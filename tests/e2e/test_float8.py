"""A run in float8, from the command line: its checkpoints are those of any run."""

from pathlib import Path

import pytest

from dist_llm.config.load import load_saved
from dist_llm.launch.world import World
from dist_llm.parallel import parallelize
from dist_llm.train.score import Windows, score
from tests.e2e import commands

FLOAT8 = ("precision=bf16", "fp8=true", "model.n_heads=2", "model.n_kv_heads=2")  # sides that divide by 16


@pytest.mark.slow
def test_a_run_goes_on_without_it_and_is_evaluated_without_it(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two processes in float8, then on one in bf16; evaluated in bf16, which every device has."""
    run = commands.train(tmp_path, corpus, *FLOAT8, "run.steps=6", ranks=2)
    rows = commands.metrics(run)
    assert load_saved(commands.newest(run)).fp8
    with monkeypatch.context() as patched:
        patched.setattr(parallelize, "use_float8_linears", lambda model: pytest.fail("a model in float8"))
        result = score(str(run), None, "heldout", Windows(), World())
    (heldout,) = [row["heldout_loss"] for row in commands.all_rows(run) if "heldout_loss" in row]
    assert result.loss == pytest.approx(heldout, rel=5e-3)  # what float8 rounds, after six steps
    assert result.loss != heldout

    again = commands.train(tmp_path, corpus, *FLOAT8, "run.steps=8", "fp8=false")
    assert again == run
    assert commands.metrics(run)[: len(rows)] == rows
    assert len(commands.metrics(run)) == 8
