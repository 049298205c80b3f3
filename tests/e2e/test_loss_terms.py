"""A run with z-loss and label smoothing logs the terms of its loss; its held-out loss is plain cross-entropy."""

import re
from pathlib import Path

import pytest

from . import commands
from .test_engines import ENGINES

OPTIONS = ("run.steps=2", "loss.z_loss=1e-2", "loss.label_smoothing=0.1", "eval.windows=0")


def test_terms_sum_to_the_loss_and_evaluate_agrees_with_the_run(corpus: Path, tmp_path: Path) -> None:
    run = commands.train(tmp_path, corpus, *OPTIONS)
    for row in commands.read_metrics(run):
        terms = row["cross_entropy"], row["label_smoothing"], row["z_loss"]
        assert row["loss"] == pytest.approx(sum(terms), rel=1e-6)
        assert row["z_loss"] > 0.1
    (heldout,) = [row["heldout_loss"] for row in commands.read_rows(run) if "heldout_loss" in row]
    assert heldout == pytest.approx(commands.read_metrics(run)[-1]["cross_entropy"], abs=0.1), "the z-loss is 0.4"
    printed = commands.run("evaluate", "--checkpoint", "run", cwd=tmp_path).stdout
    assert float(re.search(r"loss ([0-9.]+) nats", printed)[1]) == pytest.approx(heldout, abs=1e-4)  # type: ignore[index]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["deepspeed", "pipeline", "accelerate"])
def test_every_engine_logs_the_same_terms(engine: str, corpus: Path, tmp_path: Path) -> None:
    values = []  # of the engine, then of a native run
    for run_index, (options, ranks) in enumerate(((ENGINES[engine], 2), (("model.tie_embeddings=false",), 0))):
        directory = tmp_path / str(run_index)
        directory.mkdir()
        tied = () if engine == "pipeline" else ("model.tie_embeddings=true",)
        run = commands.train(directory, corpus, *OPTIONS, *options, *tied, ranks=ranks)
        names = ("loss", "cross_entropy", "label_smoothing", "z_loss", "heldout_loss")
        values.append([row[name] for row in commands.read_rows(run) for name in names if name in row])
    assert values[0] == pytest.approx(values[1], rel=1e-5, abs=5e-6), (
        "label smoothing adds 1e-3 to a loss of 6.6 in fp32"
    )
    assert len(values[0]) == 9
