"""`dist-llm check` finds no problem on one healthy machine, and reports a rank that never joins."""

import socket
import subprocess
from pathlib import Path

from . import commands

HOST = socket.gethostname()


def test_one_process_finds_no_problem(tmp_path: Path) -> None:
    completed = commands.run("check", "--directory", tmp_path, cwd=tmp_path)
    assert completed.stdout.endswith("no problem found; ranks: 1, nodes: 1\n")
    assert f"│ {HOST}" in completed.stdout
    assert completed.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_find_at_most_a_busy_core(tmp_path: Path) -> None:
    """One of two cores may be slower for half a second, so a report of a slow core is allowed."""
    completed = commands.run("check", ranks=2, cwd=tmp_path, succeed=False)
    assert completed.stdout.count(HOST) == 1, completed.stderr
    assert "│ 0-1   │ same     │" in completed.stdout
    problems = [line for line in completed.stderr.splitlines() if line.startswith(f"  {HOST}: ")]
    assert all("TFLOP/s" in line for line in problems), completed.stderr
    assert (completed.returncode == 0) == (not problems), completed.stderr
    assert ("no problem found; ranks: 2, nodes: 1" in completed.stdout) == (not problems)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_never_joins_does_not_block_the_others(tmp_path: Path) -> None:
    completed = subprocess.run(
        commands.make_command("check", "--seconds", 2),  # rank 0 of a world of two ranks
        cwd=tmp_path,
        env=commands.make_environment() | commands.make_rank_environments(2)[0],
        capture_output=True,
        text=True,
        timeout=commands.TIMEOUT_SECONDS,
    )
    assert completed.returncode == 2
    expected = f"error: 1 problem found:\n  {HOST}: rank 0 is still in the rendezvous of all ranks after 2 s\n"
    assert completed.stderr == expected
