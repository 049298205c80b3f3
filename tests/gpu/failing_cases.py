"""Run `gpu.py` on the CPU with cases that hang or crash; test_gpu_command.py checks the results.

Child processes import this file under another module name, so they have the same cases.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
from gpu_cases import CASES, BenchmarkCase
from gpu_context import CaseContext


def hang(context: CaseContext) -> None:
    """Run longer than the time limit of the case."""
    time.sleep(600)


def crash(context: CaseContext) -> None:
    """End the process without a result."""
    os._exit(3)


cases_by_name = {case.name: case for case in CASES}
CASES[:] = [
    cases_by_name["environment"],
    BenchmarkCase("check", "hangs", hang, limit_seconds=0.3),
    BenchmarkCase("check", "crashes", crash),
    cases_by_name["loss"],
    BenchmarkCase("check", "hangs for long", hang, limit_seconds=600),
]

if __name__ == "__main__":
    sys.exit(gpu.main())
