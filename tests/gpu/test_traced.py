"""The engine's step on a GPU that is not there: what it computes lies there, and is not asked for."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="a GPU is pretended by torch's CPU build alone")


def traced(*arguments: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.gpu.traced", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_models_and_layouts_take_a_step() -> None:
    """Where it asks for a value of the device, or mixes devices, a case has an error in place of what is asserted."""
    rows = {row.pop("case"): row for row in traced()}
    assert {"llama", "t5", "documents", "fp8", "offload", "tp", "cp", "dp_replicate, dp_shard"} <= rows.keys()
    for case, row in rows.items():
        single = case in ("fp32", "prefix", "documents", "dropout")
        assert row == {"devices": ["cuda"], "products": ["float32" if single else "bfloat16"]}, case


@pytest.mark.parametrize(("bug", "error"), [("host", "found at least two devices"), ("waits", "_local_scalar_dense")])
def test_a_planted_bug_is_seen(bug: str, error: str) -> None:
    (row,) = traced("--plant", bug)
    assert error in row["error"]
