"""Run `gpu.py` on the CPU with rows that fail; test_gpu_command.py checks what it leaves.

Child processes run this file, too, under another module name, and so have the same rows.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
from gpu_context import Context
from gpu_rows import ROWS, Row


def hang(context: Context) -> None:
    time.sleep(600)


def die(context: Context) -> None:
    os._exit(3)


by_name = {row.name: row for row in ROWS}
ROWS[:] = [
    by_name["environment"],
    Row("check", "hangs", hang, limit=0.3),
    Row("check", "dies", die),
    by_name["loss"],
    Row("check", "hangs for long", hang, limit=600),
]

if __name__ == "__main__":
    sys.exit(gpu.main())
