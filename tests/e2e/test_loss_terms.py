"""A run with z-loss and label smoothing logs what its loss is made of, and its held-out loss is plain cross-entropy."""

import re
from pathlib import Path

import pytest

from . import commands


def test_terms_add_up_and_evaluate_agrees_with_the_run(corpus: Path, tmp_path: Path) -> None:
    options = ("run.steps=2", "loss.z_loss=1e-2", "loss.label_smoothing=0.1", "eval.windows=0")
    run = commands.train(tmp_path, corpus, *options)
    for row in commands.metrics(run):
        parts = row["cross_entropy"], row["label_smoothing"], row["z_loss"]
        assert row["loss"] == pytest.approx(sum(parts), rel=1e-6)
        assert row["z_loss"] > 0.1
    (heldout,) = [row["heldout_loss"] for row in commands.all_rows(run) if "heldout_loss" in row]
    assert heldout == pytest.approx(commands.metrics(run)[-1]["cross_entropy"], abs=0.1), "the z-loss is 0.4"
    printed = commands.run("evaluate", "--checkpoint", "run", cwd=tmp_path).stdout
    assert float(re.search(r"loss ([0-9.]+) nats", printed)[1]) == pytest.approx(heldout, abs=1e-4)  # type: ignore[index]
