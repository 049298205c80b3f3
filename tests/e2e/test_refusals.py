"""What a user sees when something is wrong: the exit code, the message, and nothing left behind."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from . import commands
from .conftest import ONE, Layout


def test_all_that_is_wrong_with_a_config_is_in_one_message(corpus: Path, tmp_path: Path) -> None:
    wrong = ("model.n_head=3", "optim.lr=fast", "parallel.dp_shard=3")
    done = commands.run(*commands.train_arguments(corpus, *wrong), cwd=tmp_path, succeed=False)
    assert done.returncode == 2
    assert "model.n_head: unknown key; did you mean model.n_heads?" in done.stderr
    assert "optim.lr: input should be a valid number, found 'fast'" in done.stderr
    assert "parallel.dp_shard: the layout (dp_shard 3) needs 3 ranks, but 1 were started" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_under_torchrun_one_rank_speaks_for_all(corpus: Path, tmp_path: Path) -> None:
    arguments = commands.train_arguments(corpus, "parallel.dp_shard=4")
    done = commands.run(*arguments, ranks=2, cwd=tmp_path, succeed=False)
    assert done.returncode != 0
    assert done.stderr.count("parallel.dp_shard: the layout (dp_shard 4) needs 4 ranks, but 2 were started") == 1
    assert re.search(r"exitcode +: 2 ", done.stderr), "torchrun's own exit code is 1; it prints the rank's"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "--checkpoint", "nowhere"), "nowhere: holds no complete checkpoint"),
        (("generate", "--checkpoint", "nowhere", "--top-p", 0), "--top-p 0.0: must be above 0 and at most 1"),
        (("train", "--config", "nowhere.yaml"), "nowhere.yaml: cannot be read: No such file or directory"),
        (("train", "run.steps=3"), "give exactly one config file, not 0"),
        (("prepare", "--source", "nowhere", "--tokenizer", "byte", "--out", "x"), "--source nowhere: no such file"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_command_says_what_it_cannot_do(arguments: tuple[object, ...], message: str, tmp_path: Path) -> None:
    done = commands.run(*arguments, cwd=tmp_path, succeed=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_that_was_never_finished_is_refused(corpus: Path, tmp_path: Path) -> None:
    unfinished = shutil.copytree(corpus, tmp_path / "unfinished")
    (unfinished / "manifest.json").unlink()
    done = commands.run(*commands.train_arguments(unfinished), cwd=tmp_path, succeed=False)
    assert done.returncode == 2
    assert "not a prepared corpus (manifest.json is missing)" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_damaged_shard_is_named_with_its_byte(ranks: int, corpus: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(corpus, tmp_path / "damaged")
    tokens = np.memmap(damaged / "train-00000.bin", dtype="<u2", mode="r+")
    tokens[:] = 60_000
    tokens.flush()
    done = commands.run(*commands.train_arguments(damaged), ranks=ranks, cwd=tmp_path, succeed=False)
    assert done.returncode == (1 if ranks else 2)
    assert re.search(r"train-00000\.bin: token \d+ \(byte \d+\) is 60000, but the tokenizer has 512 ids", done.stderr)
    assert "60000, but the tokenizer has 512 ids" in (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert not list((tmp_path / "run").glob("checkpoints/*/COMMITTED"))


def test_the_last_lines_of_a_failure_name_rank_host_and_reason(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "logs" / "rank_00001.log").mkdir(parents=True)  # rank 1 alone cannot open its log
    done = commands.run(*commands.train_arguments(corpus), ranks=2, cwd=tmp_path, succeed=False)
    assert done.returncode == 1
    last = done.stderr[done.stderr.index("Root Cause") :]
    assert re.search(r"host +: \S+\n +rank +: 1 .*\n +exitcode +: 2 ", last), last
    assert re.search(r"rank_00001\.log: Is a directory; there is a directory where a file should be", last), last


def test_a_run_is_not_resumed_with_another_model(
    straight: Callable[[Layout], Path], corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(straight(ONE), tmp_path / "run")
    done = commands.run(*commands.train_arguments(corpus, "model.d_model=32"), cwd=tmp_path, succeed=False)
    assert done.returncode == 2
    assert "model.d_model: 64 in the checkpoint, 32 in this config" in done.stderr


def test_a_second_job_does_not_write_into_a_run_that_goes_on(corpus: Path, tmp_path: Path) -> None:
    """Nor into its checkpoints from another run.dir; once it is killed, the next start goes on from it."""
    run = tmp_path / "run"

    def refuse(*overrides: str) -> bool:
        if not (run / "metrics.jsonl").exists() or len(commands.metrics(run)) < 3:
            return False
        config = (run / "config.yaml").read_bytes()
        second = commands.train_arguments(corpus, "optim.lr=1", "run.steps=2")
        done = commands.run(*second, *overrides, cwd=tmp_path, succeed=False)
        assert done.returncode == 2, done.stderr
        assert re.search(r"run\.dir: run is in use by process \d+ on \S+, started ", done.stderr)
        elsewhere = commands.run(
            *second, "run.dir=other", "checkpoint.dir=run/checkpoints", cwd=tmp_path, succeed=False
        )
        assert elsewhere.returncode == 2
        assert re.search(r"checkpoint\.dir: \S*run/checkpoints is in use by process", elsewhere.stderr)
        assert not (tmp_path / "other" / "metrics.jsonl").exists()
        assert (run / "config.yaml").read_bytes() == config
        return True

    long = commands.train_arguments(corpus, "run.steps=100000", "checkpoint.every=2")
    commands.kill_when(refuse, long, 0, tmp_path)
    assert (run / "run.lock").exists()
    done = commands.run(*long, "run.steps=2", cwd=tmp_path)
    assert "resumed from" in done.stderr
    assert not (run / "run.lock").exists()
