"""The programs of examples/ and the Python blocks of documents run."""

import re
from pathlib import Path
from typing import Any

import pytest

from . import commands
from .commands import REPOSITORY

SMALL_RUN = ("run.steps=4", "data.seq_len=64", "data.global_batch=4", "log.peak_tflops=1.0")


def test_train_from_python_runs_on_two_ranks(corpus: Path, tmp_path: Path) -> None:
    script = str(REPOSITORY / "examples/train_from_python.py")
    commands.run("--corpus", corpus, *SMALL_RUN, "parallel.dp_shard=2", ranks=2, cwd=tmp_path, module=script)
    assert (tmp_path / "runs/example/metrics.jsonl").exists()


def test_sweep_prints_the_loss_of_each_learning_rate(corpus: Path, tmp_path: Path) -> None:
    script = str(REPOSITORY / "examples/sweep.py")
    completed = commands.run("--corpus", corpus, "--lr", 1e-3, 1e-2, "--", *SMALL_RUN, cwd=tmp_path, module=script)
    assert len(re.findall(r"^lr 0\.0\d+: held-out loss [\d.]+$", completed.stdout, re.MULTILINE)) == 2


def train_with_custom_evaluator(corpus: Path, cwd: Path, *overrides: str, ranks: int = 0) -> list[dict[str, Any]]:
    """Run examples/custom_evaluator.py in a new folder; return the rows of its metrics."""
    cwd.mkdir()
    script = str(REPOSITORY / "examples/custom_evaluator.py")
    keys = (*SMALL_RUN, "data.micro_batch=1", "eval.every=2", "optim.lr=0.01")
    commands.run("--corpus", corpus, "--", *keys, *overrides, ranks=ranks, cwd=cwd, module=script)
    return commands.read_all_rows(cwd / "runs/custom-evaluator")


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.tp=2",),
        ("parallel.dp_shard=2",),
        pytest.param(("parallel.pp=2",), marks=pytest.mark.slow),
        pytest.param(("parallel.cp=2",), marks=pytest.mark.slow),
        pytest.param(("engine=deepspeed", "deepspeed.stage=2", "parallel.dp_shard=2"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_custom_evaluator_measures_the_same_on_each_layout(
    layout: tuple[str, ...], corpus: Path, tmp_path: Path
) -> None:
    reference, rows = (
        train_with_custom_evaluator(corpus, tmp_path / "reference"),
        train_with_custom_evaluator(corpus, tmp_path / "layout", *layout, ranks=2),
    )
    accuracies = [row["continuation_accuracy"] for row in reference if "continuation_accuracy" in row]
    assert len(accuracies) == 2
    assert 0.4 < accuracies[-1] < 1
    assert [row["continuation_accuracy"] for row in rows if "heldout_loss" in row] == accuracies
    assert "the best accuracy of continuations so far" in next(row["event"] for row in rows if "event" in row)


def test_the_python_of_the_readme_runs(corpus: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    block, num_removed = re.subn(
        r"^ *dist_llm\.prepare\(.*\n", "", block.replace('"data/from-python"', repr(str(corpus))), flags=re.M
    )
    assert num_removed == 1, "the README has no call of prepare"  # the corpus of the fixture replaces it
    (tmp_path / "readme.py").write_text(block.replace('"run.steps=20"', ", ".join(map(repr, SMALL_RUN))))
    completed = commands.run(cwd=tmp_path, module=str(tmp_path / "readme.py"))
    assert "held-out loss" in completed.stdout


def test_the_python_of_the_page_on_callbacks_runs(corpus: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs/callbacks.md").read_text(), re.DOTALL)
    keys = ", ".join(map(repr, (*SMALL_RUN, f"data.path={corpus}")))
    block, num_replaced = re.subn(r'"data\.path=data/stdlib"', lambda match: keys, block)
    assert num_replaced == 1
    (tmp_path / "page.py").write_text(block)
    commands.run(ranks=2, cwd=tmp_path, module=str(tmp_path / "page.py"))
    rows = commands.read_all_rows(tmp_path / "runs/callbacks")
    assert {"weight_norm", "first_microbatch_loss"} <= {name for row in rows for name in row}
