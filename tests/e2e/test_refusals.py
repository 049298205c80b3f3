"""A command that refuses its input exits with code 2, explains the error, and leaves no file behind."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from . import commands
from .conftest import ONE_PROCESS, Layout


def test_all_config_errors_are_in_one_message(corpus: Path, tmp_path: Path) -> None:
    overrides = ("model.n_head=3", "optim.lr=fast", "parallel.dp_shard=3")
    completed = commands.run(*commands.make_train_arguments(corpus, *overrides), cwd=tmp_path, succeed=False)
    assert completed.returncode == 2
    assert "model.n_head: unknown key; did you mean model.n_heads?" in completed.stderr
    assert "optim.lr: input should be a valid number, found 'fast'" in completed.stderr
    assert "parallel.dp_shard: the layout (dp_shard 3) needs 3 ranks, but 1 were started" in completed.stderr
    assert "Traceback" not in completed.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_that_matches_no_parameter_is_refused(corpus: Path, tmp_path: Path) -> None:
    arguments = commands.make_train_arguments(corpus, "optim.groups=[{pattern: layers.*, freeze: true}]")
    completed = commands.run(*arguments, cwd=tmp_path, succeed=False)
    assert completed.returncode == 2
    assert "optim.groups.0.pattern: layers.* matches no parameter; names are embed.tokens.weight" in completed.stderr
    assert "Traceback" not in completed.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_error_is_printed_once_under_torchrun(corpus: Path, tmp_path: Path) -> None:
    arguments = commands.make_train_arguments(corpus, "parallel.dp_shard=4")
    completed = commands.run(*arguments, ranks=2, cwd=tmp_path, succeed=False)
    assert completed.returncode != 0
    assert completed.stderr.count("parallel.dp_shard: the layout (dp_shard 4) needs 4 ranks, but 2 were started") == 1
    assert re.search(r"exitcode +: 2 ", completed.stderr), "torchrun does not print the exit code of the rank"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--checkpoint", "nowhere"), "nowhere: has no complete checkpoint"),
        (("generate", "--checkpoint", "nowhere", "--top-p", 0), "--top-p 0.0: must be above 0 and at most 1"),
        (("train", "--config", "nowhere.yaml"), "nowhere.yaml: cannot be read: No such file or directory"),
        (("train", "run.steps=3"), "give exactly one config file, not 0"),
        (("prepare", "--source", "nowhere", "--tokenizer", "byte", "--out", "x"), "--source nowhere: no such file"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_command_explains_its_error(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    completed = commands.run(*arguments, cwd=tmp_path, succeed=False)
    assert completed.returncode == 2
    assert message in completed.stderr
    assert "Traceback" not in completed.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    unfinished_corpus = shutil.copytree(corpus, tmp_path / "unfinished")
    (unfinished_corpus / "manifest.json").unlink()
    completed = commands.run(*commands.make_train_arguments(unfinished_corpus), cwd=tmp_path, succeed=False)
    assert completed.returncode == 2
    assert "not a prepared corpus (manifest.json is missing)" in completed.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_damaged_shard_is_reported_with_its_byte(ranks: int, corpus: Path, tmp_path: Path) -> None:
    damaged_corpus = shutil.copytree(corpus, tmp_path / "damaged")
    tokens = np.memmap(damaged_corpus / "train-00000.bin", dtype="<u2", mode="r+")
    tokens[:] = 60_000
    tokens.flush()
    completed = commands.run(*commands.make_train_arguments(damaged_corpus), ranks=ranks, cwd=tmp_path, succeed=False)
    assert completed.returncode == (1 if ranks else 2)
    assert re.search(
        r"train-00000\.bin: token \d+ \(byte \d+\) is 60000, but the tokenizer has 512 ids", completed.stderr
    )
    assert "60000, but the tokenizer has 512 ids" in (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert not list((tmp_path / "run").glob("checkpoints/*/COMMITTED"))


def test_a_failure_ends_with_rank_host_and_reason(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "logs" / "rank_00001.log").mkdir(parents=True)  # only rank 1 cannot open its log
    completed = commands.run(*commands.make_train_arguments(corpus), ranks=2, cwd=tmp_path, succeed=False)
    assert completed.returncode == 1
    report = completed.stderr[completed.stderr.index("Root Cause") :]
    assert re.search(r"host +: \S+\n +rank +: 1 .*\n +exitcode +: 2 ", report), report
    assert re.search(r"rank_00001\.log: Is a directory; there is a directory where a file should be", report), report


def test_a_run_is_not_resumed_with_another_model(
    uninterrupted_run: Callable[[Layout], Path], corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(uninterrupted_run(ONE_PROCESS), tmp_path / "run")
    completed = commands.run(*commands.make_train_arguments(corpus, "model.d_model=32"), cwd=tmp_path, succeed=False)
    assert completed.returncode == 2
    assert "model.d_model: 64 in the checkpoint, 32 in this config" in completed.stderr


def test_a_second_job_does_not_write_into_a_running_run(corpus: Path, tmp_path: Path) -> None:
    """A second job is refused if its run.dir or its checkpoint.dir is in use. After a kill, the next start resumes."""
    run = tmp_path / "run"

    def try_second_job(*overrides: str) -> bool:
        """Start a second job once the first has written 3 metrics, and check that it is refused."""
        if not (run / "metrics.jsonl").exists() or len(commands.read_step_rows(run)) < 3:
            return False
        config = (run / "config.yaml").read_bytes()
        second_job = commands.make_train_arguments(corpus, "optim.lr=1", "run.steps=2")
        completed = commands.run(*second_job, *overrides, cwd=tmp_path, succeed=False)
        assert completed.returncode == 2, completed.stderr
        assert re.search(r"run\.dir: run is in use by process \d+ on \S+, started ", completed.stderr)
        other_run_dir = commands.run(
            *second_job, "run.dir=other", "checkpoint.dir=run/checkpoints", cwd=tmp_path, succeed=False
        )
        assert other_run_dir.returncode == 2
        assert re.search(r"checkpoint\.dir: \S*run/checkpoints is in use by process", other_run_dir.stderr)
        assert not (tmp_path / "other" / "metrics.jsonl").exists()
        assert (run / "config.yaml").read_bytes() == config
        return True

    long_run = commands.make_train_arguments(corpus, "run.steps=100000", "checkpoint.every=2")
    commands.kill_when(try_second_job, long_run, ranks=0, cwd=tmp_path)
    assert (run / "run.lock").exists()
    completed = commands.run(*long_run, "run.steps=2", cwd=tmp_path)
    assert "resumed from" in completed.stderr
    assert not (run / "run.lock").exists()
