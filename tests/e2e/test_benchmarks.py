"""The programs in benchmarks/ run, and print what they promise. No figure is asserted: machines are noisy."""

import json
import subprocess
import sys

import pytest

from . import commands
from .commands import REPOSITORY

OVERHEAD = REPOSITORY / "benchmarks" / "overhead.py"


def test_overhead_prints_a_line_per_pair_and_a_table() -> None:
    done = benchmark("--config", str(commands.DEBUG_CONFIG), "--pairs", "2", "--steps", "2")
    pairs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [pair["pair"] for pair in pairs] == [1, 2]
    for pair in pairs:
        assert pair["ratio"] == pytest.approx(pair["ours"] / pair["bare"], rel=1e-3)
    assert "the claim, a ratio of at least 0.98: median" in done.stderr


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, OVERHEAD, *arguments],
        env=commands.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=commands.LIMIT_SECONDS,
        check=True,
    )
