"""The programs of examples/ and the Python block of the README run."""

import re
from pathlib import Path

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


def test_the_python_of_the_readme_runs(corpus: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    block, num_removed = re.subn(
        r"^ *dist_llm\.prepare\(.*\n", "", block.replace('"data/from-python"', repr(str(corpus))), flags=re.M
    )
    assert num_removed == 1, "the README has no call of prepare"  # the corpus of the fixture replaces it
    (tmp_path / "readme.py").write_text(block.replace('"run.steps=20"', ", ".join(map(repr, SMALL_RUN))))
    completed = commands.run(cwd=tmp_path, module=str(tmp_path / "readme.py"))
    assert "held-out loss" in completed.stdout
