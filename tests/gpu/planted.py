"""A program: `gpu.py` on the CPU with planted faults, in rows of its own; test_gpu_command.py says what it must print.

Child processes run this file, too, under another name, and so have the same rows and the same fault in the loss.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
import torch
from gpu_context import Context
from gpu_rows import ROWS, Row

from dist_llm.losses import linear

TURN = linear._turn


def wrong(*arguments: Any) -> torch.Tensor:
    """The losses of tokens, a thousandth too large."""
    return TURN(*arguments) * 1.001


def hang(context: Context) -> None:
    time.sleep(600)


def die(context: Context) -> None:
    os._exit(3)


def run_out_of_memory(context: Context) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB.")


linear._turn = wrong
WANTED = ("environment", "loss", "generation", "llama-1b, 4k x 4", "profile, eager")
FAULTS = [Row("check", "hangs", hang, limit=0.3), Row("check", "dies", die), Row("train", "memory", run_out_of_memory)]
by_name = {row.name: row for row in ROWS}
ROWS[:] = [*(by_name[name] for name in WANTED[:2]), *FAULTS, *(by_name[name] for name in WANTED[2:])]

if __name__ == "__main__":
    sys.exit(gpu.main())
