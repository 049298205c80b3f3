"""After a stop signal all ranks save a checkpoint of the same step and exit; a rank that fails or hangs is reported."""

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
from .compare_runs import assert_same_metrics, assert_same_weights
from .conftest import ONE_PROCESS, SHARDED, Layout
from .faults import NO_FAULT, Fault, start_with_fault, wait_for_end


def read_stop_marker(run: Path) -> dict[str, object]:
    """Return the content of stopped.json in a run directory."""
    marker: dict[str, object] = json.loads((run / "stopped.json").read_text())
    return marker


@pytest.mark.parametrize(
    ("fault", "code"),
    [("usr1", 138), *(pytest.param(*values, marks=pytest.mark.slow) for values in (("term", 143), ("int", 130)))],
)
def test_one_process_saves_after_the_step_and_resumes_with_equal_results(
    fault: str, code: int, uninterrupted_run: Callable[[Layout], Path], corpus: Path, tmp_path: Path
) -> None:
    process = start_with_fault(Fault(fault, rank=0, step=7), corpus, tmp_path, "checkpoint.every=0", ranks=0)
    exit_code, output, remaining = wait_for_end(process, timeout_seconds=60)
    assert (exit_code, remaining) == (code, []), output
    step = int(str(read_stop_marker(tmp_path / "run")["step"]))
    assert step in (7, 8), "the run did not stop within one step"
    assert commands.find_latest_checkpoint(tmp_path / "run").name == f"step_{step:08d}"
    assert f"stopped by SIG{fault.upper()} after step {step}, saved" in output
    commands.run(*commands.make_train_arguments(corpus), cwd=tmp_path)
    assert not (tmp_path / "run" / "stopped.json").exists(), "the stop marker remains after the resume"
    expected = uninterrupted_run(ONE_PROCESS)
    assert_same_metrics(tmp_path / "run", expected)
    assert_same_weights(tmp_path / "run", expected)


# The command receives a signal while it imports torch ("torch"), or at the exit of Python: with the signal mask of the
# main thread ("end"), or with SIGUSR1 unblocked, as in threads that training has started ("thread").
SIGNAL_SCRIPT = """
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
def test_signals_before_and_after_training_are_handled(
    when: str, code: int, step: int, corpus: Path, tmp_path: Path
) -> None:
    arguments = map(str, commands.make_train_arguments(corpus, "run.steps=3"))
    completed = subprocess.run(
        [sys.executable, "-c", SIGNAL_SCRIPT, when, *arguments],
        cwd=tmp_path,
        env=commands.make_environment(),
        capture_output=True,
        text=True,
        timeout=commands.TIMEOUT_SECONDS,
    )
    assert completed.returncode == code, completed.stderr
    assert commands.find_latest_checkpoint(tmp_path / "run").name == f"step_{step:08d}"
    assert (tmp_path / "run" / "stopped.json").exists() == bool(code)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(rank: int, corpus: Path, tmp_path: Path) -> None:
    process = start_with_fault(Fault("usr1", rank=rank, step=5), corpus, tmp_path, *SHARDED.overrides)
    _, output, remaining = wait_for_end(process, timeout_seconds=60)
    assert not remaining
    step = int(str(read_stop_marker(tmp_path / "run")["step"]))
    assert step in (5, 6)
    assert read_stop_marker(tmp_path / "run")["signal"] == "SIGUSR1"
    assert commands.get_column(commands.read_step_rows(tmp_path / "run"), "step") == list(range(1, step + 1))
    assert commands.find_latest_checkpoint(tmp_path / "run").name == f"step_{step:08d}", output


@pytest.mark.parametrize(
    "stop_signal",
    [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT],
    ids=lambda stop_signal: stop_signal.name,
)
def test_a_signal_to_torchrun_stops_the_run(stop_signal: signal.Signals, corpus: Path, tmp_path: Path) -> None:
    process = start_with_fault(NO_FAULT, corpus, tmp_path, "run.steps=100000", *SHARDED.overrides)
    wait_for_steps(process, tmp_path / "run")
    os.kill(process.pid, stop_signal)
    _, output, remaining = wait_for_end(process, timeout_seconds=60)
    assert not remaining
    assert read_stop_marker(tmp_path / "run")["signal"] == stop_signal.name
    step = int(str(read_stop_marker(tmp_path / "run")["step"]))
    assert commands.find_latest_checkpoint(tmp_path / "run").name == f"step_{step:08d}", output


@pytest.mark.slow
def test_a_second_ctrl_c_to_torchrun_ends_ranks_that_cannot_save(corpus: Path, tmp_path: Path) -> None:
    """Rank 1 hangs, and rank 0 waits in a collective. After the first Ctrl-C, torchrun waits for up to 30 s."""
    process = start_with_fault(Fault("sleep", rank=1, step=5), corpus, tmp_path, *SHARDED.overrides)
    wait_for_steps(process, tmp_path / "run")
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    _, output, remaining = wait_for_end(process, timeout_seconds=20)
    assert not remaining, output


def wait_for_steps(process: subprocess.Popen[str], run: Path) -> None:
    """Wait until the run has written three rows of metrics."""
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_raises_ends_the_job_and_is_named(rank: int, corpus: Path, tmp_path: Path) -> None:
    process = start_with_fault(Fault("raise", rank=rank, step=4), corpus, tmp_path, *SHARDED.overrides)
    code, output, remaining = wait_for_end(process, timeout_seconds=60)
    assert code != 0
    assert not remaining, output
    assert f"rank {rank} on " in output
    assert "in step 4: ValueError: planted" in output


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("sleep", "holds up the run, in step 5: "),
        pytest.param("stop", "rank 1 does not answer: its process is stopped", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_job_ends(fault: str, message: str, corpus: Path, tmp_path: Path) -> None:
    start_time = time.monotonic()
    process = start_with_fault(Fault(fault, rank=1, step=5), corpus, tmp_path, "run.hang_seconds=3", *SHARDED.overrides)
    code, output, remaining = wait_for_end(process, timeout_seconds=100)
    assert code != 0
    assert not remaining, output
    assert message in output, output
    log = (tmp_path / "run" / "logs" / "rank_00000.log").read_text()
    assert "has made no progress for" in log
    assert "waiting in gloo:" in log
    assert "train_step" in log, "the log lacks the stack"
    if fault == "sleep":
        assert "time.sleep(3600)" in output, "the output lacks the location"
    assert time.monotonic() - start_time < 90


def test_a_rank_that_never_joins_is_named_and_the_others_exit(corpus: Path, tmp_path: Path) -> None:
    """Before the first step the watchdog multiplies its timeout by 30."""
    completed = subprocess.run(
        commands.make_command(*commands.make_train_arguments(corpus, "run.hang_seconds=0.1")),
        cwd=tmp_path,
        env=commands.make_environment() | commands.make_rank_environments(2)[0],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert completed.returncode == 70, completed.stderr
    assert "in the start, in no collective" in completed.stderr
    assert "rank 1 does not answer: its process is stopped, or its node is gone" in completed.stderr


@pytest.mark.parametrize("ranks", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(ranks: int, corpus: Path, tmp_path: Path) -> None:
    options = ("checkpoint.every=2", "log.every=3", *(SHARDED.overrides if ranks else ()))
    code, output, remaining = wait_for_end(
        start_with_fault(Fault("nan", rank=0, step=5), corpus, tmp_path, *options, ranks=ranks), timeout_seconds=60
    )
    assert code == (1 if ranks else 2), output
    assert not remaining
    assert "step 5: the loss is nan; nothing was saved since" in output
    assert commands.find_latest_checkpoint(tmp_path / "run").name == "step_00000004"
    assert [str(row["loss"]) for row in commands.read_step_rows(tmp_path / "run")][4:] == ["nan", "nan"]


def test_a_run_continues_after_nan_with_policy_warn(corpus: Path, tmp_path: Path) -> None:
    options = ("run.steps=6", "guard.not_finite=warn")
    code, output, _ = wait_for_end(
        start_with_fault(Fault("nan", rank=0, step=5), corpus, tmp_path, *options, ranks=0), timeout_seconds=60
    )
    assert code == 0, output
