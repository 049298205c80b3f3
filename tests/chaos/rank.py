"""Run `dist-llm` on a rank of a chaos test, with two additions to each step.

    python -m tests.chaos.rank DIRECTORY NUM_PACED_STEPS train ...

Each of the first NUM_PACED_STEPS steps starts with a sleep of PACE_SECONDS. If DIRECTORY contains the file `nan_HOST`,
a rank on that host removes the file and sets one of its weights to NaN.
"""

import socket
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

from dist_llm.cli import main
from dist_llm.sharded import to_local
from dist_llm.training.trainer import Trainer

PACE_SECONDS = 0.15


def get_nan_request_path(directory: Path, host: str) -> Path:
    """Return the path of the file that requests a NaN on this host."""
    return directory / f"nan_{host}"


def run() -> int:
    """Run the command of the command line; return its exit code."""
    directory, num_paced_steps, *arguments = sys.argv[1:]
    request, original_step = get_nan_request_path(Path(directory), socket.gethostname()), Trainer.take_step

    def step_with_fault(self: Trainer) -> None:
        if self.progress.step < int(num_paced_steps):
            time.sleep(PACE_SECONDS)
        if request.exists():
            request.unlink()
            weight = to_local(next(self.engine.named_parameters())[1].detach())
            weight.view(-1)[0] = torch.nan
        original_step(self)

    with patch.object(Trainer, "take_step", step_with_fault):
        return main(arguments)


if __name__ == "__main__":
    sys.exit(run())
