"""Compare a run with a reference run, bit for bit.

run = commands.train(tmp_path, corpus, "parallel.dp_shard=2", ranks=2)
assert_same_metrics(run, expected_run, names=("loss", "grad_norm"))
assert_same_weights(run, expected_run)
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from dist_llm.generation import load_model
from dist_llm.param_spec import iter_weights

from . import commands


def assert_same_metrics(run: Path, expected_run: Path, *, names: Sequence[str] = ("loss",)) -> None:
    """Raise AssertionError unless the metrics `names` of all training steps are equal. Both are run directories."""
    rows, expected_rows = commands.read_step_rows(run), commands.read_step_rows(expected_run)
    for name in names:
        assert commands.get_column(rows, name) == commands.get_column(expected_rows, name), name


def assert_same_weights(run: Path, expected_run: Path) -> None:
    """Raise AssertionError unless the weights of the newest checkpoints are equal. Both are run directories."""
    weights, expected_weights = load_weights(run), load_weights(expected_run)
    assert len(expected_weights) > 10, "the model has too few parameters for a comparison"
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name


def load_weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers of the newest checkpoint of a run directory by name."""
    model, *_ = load_model(run, torch.device("cpu"))
    return dict(iter_weights(model))
