"""A run with z-loss and label smoothing logs the terms of its loss; its held-out loss is plain cross-entropy."""

import re
from pathlib import Path

import pytest

from . import commands
from .test_engines import ENGINES

# eval.windows=0: evaluate all windows of the held-out text, as `dist-llm evaluate` does.
OPTIONS = ("run.steps=2", "loss.z_loss=1e-2", "loss.label_smoothing=0.1", "eval.windows=0")


def test_terms_sum_to_the_loss_and_evaluate_agrees_with_the_run(corpus: Path, tmp_path: Path) -> None:
    run = commands.train(tmp_path, corpus, *OPTIONS)
    for row in commands.read_step_rows(run):
        terms = row["cross_entropy"], row["label_smoothing"], row["z_loss"]
        assert row["loss"] == pytest.approx(sum(terms), rel=1e-6)
        assert row["z_loss"] > 0.1
    (heldout,) = [row["heldout_loss"] for row in commands.read_all_rows(run) if "heldout_loss" in row]
    # With the z-loss, which is 0.4 here, the held-out loss would be farther from the cross-entropy of training.
    assert heldout == pytest.approx(commands.read_step_rows(run)[-1]["cross_entropy"], abs=0.1)
    printed = commands.run("evaluate", "--checkpoint", "run", cwd=tmp_path).stdout
    assert float(re.search(r"loss ([0-9.]+) nats", printed)[1]) == pytest.approx(heldout, abs=1e-4)  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "deepspeed_pipeline", "accelerate"])
def test_every_engine_logs_the_same_terms(engine: str, corpus: Path, tmp_path: Path) -> None:
    # The pipeline engine does not support tied embeddings.
    embeddings = f"model.tie_embeddings={str(engine != 'deepspeed_pipeline').lower()}"
    values_of_run = []
    for run_name, options, ranks in (("engine", ENGINES[engine], 2), ("native", (), 0)):
        directory = tmp_path / run_name
        directory.mkdir()
        run = commands.train(directory, corpus, *OPTIONS, *options, embeddings, ranks=ranks)
        names = ("loss", "cross_entropy", "label_smoothing", "z_loss", "heldout_loss")
        values_of_run.append([row[name] for row in commands.read_all_rows(run) for name in names if name in row])
    engine_values, native_values = values_of_run
    assert len(engine_values) == 9, "the metrics do not have four values for each of two steps and a held-out loss"
    # The label-smoothing term is 1e-3 of a loss of 6.6 in fp32, so it has few digits.
    assert engine_values == pytest.approx(native_values, rel=1e-5, abs=5e-6)
