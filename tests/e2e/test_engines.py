"""A run has the same files, the same metrics keys and the same losses on every engine."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engines.fake_engine import install_engine

from . import commands

ENGINES = {
    "native": (),
    "deepspeed": ("engine=deepspeed", "deepspeed.stage=2"),
    "deepspeed_pipeline": ("engine=deepspeed", "deepspeed.stage=1", "parallel.pp=2", "model.tie_embeddings=false"),
    "accelerate": ("engine=accelerate",),
}


def read_files_and_rows(run: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """Return (names of files, rows of metrics); checkpoint shards and TensorBoard files are left out."""
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    names = {name for name in files if "tensorboard" not in name and ".distcp" not in name}
    return names, [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def native_runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two native runs on one process: with tied and with untied embeddings."""
    directories = {name: tmp_path_factory.mktemp("native") for name in ("tied", "untied")}
    options = ("run.steps=6", "checkpoint.every=3")
    return {
        name: commands.train(directory, corpus, *options, f"model.tie_embeddings={str(name == 'tied').lower()}")
        for name, directory in directories.items()
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_writes_the_same_files_and_metrics(
    engine: str, corpus: Path, native_runs: dict[str, Path], tmp_path: Path
) -> None:
    run = commands.train(tmp_path, corpus, "run.steps=6", "checkpoint.every=3", *ENGINES[engine], ranks=2)
    files, rows = read_files_and_rows(run)
    expected_files, expected_rows = read_files_and_rows(
        native_runs["untied" if engine == "deepspeed_pipeline" else "tied"]
    )
    assert files == expected_files | {"logs/rank_00001.log"}
    assert [row.keys() for row in rows] == [row.keys() for row in expected_rows]
    for row, expected in zip(rows, expected_rows, strict=True):
        for key in {"loss", "grad_norm", "heldout_loss"} & row.keys():
            assert row[key] == pytest.approx(expected[key], rel=1e-4), (row["step"], key)
        for key in ("step", "lr", "tokens"):
            assert row.get(key) == expected.get(key), (row["step"], key)


def test_an_engine_of_another_package_trains(corpus: Path, native_runs: dict[str, Path], tmp_path: Path) -> None:
    """The engine of the package computes the native step, so the run has the files and losses of a native run."""
    install_engine(tmp_path)
    script = tmp_path / "with_other.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\nfrom dist_llm.cli import run\nrun()\n")
    options = ("run.steps=6", "checkpoint.every=3", "engine=fake", "model.tie_embeddings=true")
    commands.run(*commands.make_train_arguments(corpus, *options), cwd=tmp_path, module=str(script))
    files, rows = read_files_and_rows(tmp_path / "run")
    expected_files, expected_rows = read_files_and_rows(native_runs["tied"])
    assert files == expected_files
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in expected_rows if "loss" in row]
