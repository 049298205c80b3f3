"""`dist-llm check` as it is typed: alone, under torchrun, and where a rank never comes."""

import socket
import subprocess
from pathlib import Path

from . import commands

HOST = socket.gethostname()


def test_one_process_finds_no_problem(tmp_path: Path) -> None:
    done = commands.run("check", "--directory", tmp_path, cwd=tmp_path)
    assert done.stdout.endswith("no problem found; ranks: 1, nodes: 1\n")
    assert f"│ {HOST}" in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_find_no_problem_but_a_busy_core(tmp_path: Path) -> None:
    """No figure is asserted, machines are noisy: one of two cores may well be slower for half a second."""
    done = commands.run("check", ranks=2, cwd=tmp_path, succeed=False)
    assert done.stdout.count(HOST) == 1, done.stderr
    assert "│ 0-1   │ same     │" in done.stdout
    problems = [line for line in done.stderr.splitlines() if line.startswith(f"  {HOST}: ")]
    assert all("TFLOP/s" in line for line in problems), done.stderr
    assert (done.returncode == 0) == (not problems), done.stderr
    assert ("no problem found; ranks: 2, nodes: 1" in done.stdout) == (not problems)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_never_comes_does_not_hold_up_the_others(tmp_path: Path) -> None:
    done = subprocess.run(
        commands.command("check", "--seconds", 2),
        cwd=tmp_path,
        env=commands.environment() | commands.places(2)[0],
        capture_output=True,
        text=True,
        timeout=commands.LIMIT_SECONDS,
    )
    assert done.returncode == 2
    expected = f"error: 1 problem found:\n  {HOST}: rank 0 is still in the rendezvous of all ranks after 2 s\n"
    assert done.stderr == expected
