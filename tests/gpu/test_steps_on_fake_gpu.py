"""A training step keeps its tensors on the GPU and reads none of their values, for all models and layouts."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.laws.run_space import MODELS_WITH_EXPERTS

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="the fake GPU needs torch's CPU build")


def run_on_fake_gpu(*arguments: str) -> list[dict[str, Any]]:
    """Run steps_on_fake_gpu.py and return a row per case."""
    command = [sys.executable, "-m", "tests.gpu.steps_on_fake_gpu", *arguments]
    completed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=280)
    assert completed.returncode == 0, completed.stderr
    return [json.loads(line) for line in completed.stdout.splitlines()]


def test_models_and_layouts_take_a_step() -> None:
    """A case that reads a value from the GPU, or mixes devices, prints an error instead of these fields."""
    rows = {row.pop("case"): row for row in run_on_fake_gpu()}
    assert {"llama", "t5", "documents", "fp8", "offload", "tp", "cp", "dp_replicate, dp_shard"} <= rows.keys()
    for case, row in rows.items():
        dtypes = ["float32"] if case in ("fp32", "prefix", "documents", "dropout") else ["bfloat16"]
        if case in MODELS_WITH_EXPERTS:
            dtypes = ["bfloat16", "float32"]  # routers compute in fp32
        assert row == {"devices": ["cuda"], "products": dtypes}, case


@pytest.mark.parametrize(
    ("bug", "error"), [("angles_on_cpu", "found at least two devices"), ("norm_is_read", "_local_scalar_dense")]
)
def test_a_planted_bug_is_reported(bug: str, error: str) -> None:
    (row,) = run_on_fake_gpu("--plant", bug)
    assert error in row["error"]
