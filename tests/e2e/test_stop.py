"""Told to stop, all ranks save after the same step and leave; a rank that fails or hangs is named, and ends the job."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from . import commands
from .conftest import ONE, SHARDED, Layout
from .test_kill import assert_same_weights

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def start(
    fault: tuple[object, ...], corpus: Path, cwd: Path, *overrides: object, ranks: int = 2
) -> subprocess.Popen[str]:
    launcher = TORCHRUN if ranks else [sys.executable]
    arguments = commands.train_arguments(corpus, "run.steps=20", *overrides)
    return subprocess.Popen(
        [*launcher, "-m", "tests.e2e.faulty", *map(str, fault), *map(str, arguments)],
        cwd=cwd,
        env={**commands.environment(), "PYTHONPATH": str(commands.REPOSITORY)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str], seconds: float) -> tuple[int, str, list[int]]:
    """(exit code, output, processes that are left): within `seconds` of now."""
    family = commands._family(process.pid)
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        left = [each for each in commands._family(process.pid) + family if _alive(each)]
        commands._kill(left)
    return process.returncode, output, left


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def word(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "stopped.json").read_text())
    return found


@pytest.mark.parametrize(
    ("fault", "code"),
    [("usr1", 138), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("term", 143), ("int", 130)))],
)
def test_one_process_saves_after_the_step_and_goes_on_with_the_same_bits(
    fault: str, code: int, straight: Callable[[Layout], Path], corpus: Path, tmp_path: Path
) -> None:
    process = start((fault, 0, 7), corpus, tmp_path, "checkpoint.every=0", ranks=0)
    found, output, left = end(process, 60)
    assert (found, left) == (code, []), output
    step = int(str(word(tmp_path / "run")["step"]))
    assert step in (7, 8), "within one step"
    assert commands.newest(tmp_path / "run").name == f"step_{step:08d}"
    assert f"stopped by SIG{fault.upper()} after step {step}, saved" in output
    commands.run(*commands.train_arguments(corpus), cwd=tmp_path)
    assert not (tmp_path / "run" / "stopped.json").exists(), "it goes on"
    want = straight(ONE)
    assert commands.column(commands.metrics(tmp_path / "run"), "loss") == commands.column(
        commands.metrics(want), "loss"
    )
    assert_same_weights(tmp_path / "run", want)


# The command, signalled while it imports torch ("torch") or, all done, while Python ends: in a thread that blocks what
# the main one does ("end"), or in one that does not, as those that training started ("thread").
OUTSIDE = """
import atexit, os, signal, sys

when, *sys.argv[1:] = sys.argv[1:]

class Importing:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGUSR1)

if when == "torch":
    sys.meta_path.insert(0, Importing())
else:
    atexit.register(os.kill, os.getpid(), signal.SIGUSR1)
if when == "thread":  # registered last, so first
    atexit.register(signal.pthread_sigmask, signal.SIG_UNBLOCK, {signal.SIGUSR1})
from dist_llm.cli import run
run()
"""


@pytest.mark.parametrize(("when", "code", "step"), [("torch", 138, 1), ("end", 0, 3), ("thread", 0, 3)])
def test_a_warning_before_training_listens_is_not_lost_and_one_after_it_fails_nothing(
    when: str, code: int, step: int, corpus: Path, tmp_path: Path
) -> None:
    arguments = map(str, commands.train_arguments(corpus, "run.steps=3"))
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE, when, *arguments],
        cwd=tmp_path,
        env=commands.environment(),
        capture_output=True,
        text=True,
        timeout=commands.LIMIT_SECONDS,
    )
    assert done.returncode == code, done.stderr
    assert commands.newest(tmp_path / "run").name == f"step_{step:08d}"
    assert (tmp_path / "run" / "stopped.json").exists() == bool(code)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(rank: int, corpus: Path, tmp_path: Path) -> None:
    process = start(("usr1", rank, 5), corpus, tmp_path, *SHARDED.overrides)
    _, output, left = end(process, 60)
    assert not left
    step = int(str(word(tmp_path / "run")["step"]))
    assert step in (5, 6)
    assert word(tmp_path / "run")["signal"] == "SIGUSR1"
    assert commands.column(commands.metrics(tmp_path / "run"), "step") == list(range(1, step + 1))
    assert commands.newest(tmp_path / "run").name == f"step_{step:08d}", output


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT], ids=lambda number: number.name
)
def test_a_signal_to_torchrun_is_a_stop_too(number: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    process = start(("none", 9, 9), corpus, tmp_path, "run.steps=100000", *SHARDED.overrides)
    wait_for_steps(process, tmp_path / "run")
    os.kill(process.pid, number)
    _, output, left = end(process, 60)
    assert not left
    assert word(tmp_path / "run")["signal"] == number.name
    step = int(str(word(tmp_path / "run")["step"]))
    assert commands.newest(tmp_path / "run").name == f"step_{step:08d}", output


@pytest.mark.slow
def test_a_second_ctrl_c_to_torchrun_ends_ranks_that_cannot_save(corpus: Path, tmp_path: Path) -> None:
    """Rank 1 hangs, so that rank 0 waits in a collective. After one Ctrl-C torchrun would wait for 30 s."""
    process = start(("sleep", 1, 5), corpus, tmp_path, *SHARDED.overrides)
    wait_for_steps(process, tmp_path / "run")
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    _, output, left = end(process, 20)
    assert not left, output


def wait_for_steps(process: subprocess.Popen[str], run: Path) -> None:
    rows = run / "metrics.jsonl"
    until = time.monotonic() + 60
    while not rows.exists() or rows.read_text().count("\n") < 3:
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_raises_ends_the_job_and_is_named_in_the_last_lines(
    rank: int, corpus: Path, tmp_path: Path
) -> None:
    process = start(("raise", rank, 4), corpus, tmp_path, *SHARDED.overrides)
    code, output, left = end(process, 60)
    assert code != 0
    assert not left, output
    assert f"rank {rank} on " in output
    assert "in step 4: ValueError: planted" in output


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("sleep", "holds up the run, in step 5: "),
        pytest.param("stop", "rank 1 does not answer: its process is stopped", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_job_ends(fault: str, said: str, corpus: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    process = start((fault, 1, 5), corpus, tmp_path, "run.hang_seconds=3", *SHARDED.overrides)
    code, output, left = end(process, 100)
    assert code != 0
    assert not left, output
    assert said in output, output
    log = (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert "has made no progress for" in log
    assert "waiting in gloo:" in log
    assert "train_step" in log, "the stack"
    if fault == "sleep":
        assert "time.sleep(3600)" in output, "where it is"
    assert time.monotonic() - begin < 90


def test_a_rank_that_never_comes_is_named_and_the_others_end(corpus: Path, tmp_path: Path) -> None:
    """Before the first step a rank may stand still 30 times as long."""
    done = subprocess.run(
        commands.command(*commands.train_arguments(corpus, "run.hang_seconds=0.1")),
        cwd=tmp_path,
        env=commands.environment() | commands.places(2)[0],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 70, done.stderr
    assert "in the start, in no collective" in done.stderr
    assert "rank 1 does not answer: its process is stopped, or its node is gone" in done.stderr


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(ranks: int, corpus: Path, tmp_path: Path) -> None:
    options = ("checkpoint.every=2", "log.every=3", *(SHARDED.overrides if ranks else ()))
    code, output, left = end(start(("nan", 0, 5), corpus, tmp_path, *options, ranks=ranks), 60)
    assert code == (1 if ranks else 2), output
    assert not left
    assert "step 5: the loss is nan; nothing was saved since" in output
    assert commands.newest(tmp_path / "run").name == "step_00000004"
    assert [str(row["loss"]) for row in commands.metrics(tmp_path / "run")][4:] == ["nan", "nan"]


def test_it_may_go_on_anyway(corpus: Path, tmp_path: Path) -> None:
    options = ("run.steps=6", "guard.not_finite=warn")
    code, output, _ = end(start(("nan", 0, 5), corpus, tmp_path, *options, ranks=0), 60)
    assert code == 0, output
