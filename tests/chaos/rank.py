"""`python -m tests.chaos.rank DIRECTORY PACED train ...`: run the command with two additions to each step.

Up to step PACED a step takes 0.15 s longer. If DIRECTORY contains the file `nan_HOST`, a rank on that host removes the
file and sets one of its weights to NaN.
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


def nan_request(directory: Path, host: str) -> Path:
    """Return the file whose existence requests a NaN on this host."""
    return directory / f"nan_{host}"


def run() -> int:
    directory, paced, *arguments = sys.argv[1:]
    request, step = nan_request(Path(directory), socket.gethostname()), Trainer.take_step

    def step_with_fault(self: Trainer) -> None:
        if self.progress.step < int(paced):
            time.sleep(PACE_SECONDS)
        if request.exists():
            request.unlink()
            weight = to_local(next(self.engine.named_parameters())[1].detach())
            weight.view(-1)[0] = torch.nan
        step(self)

    with patch.object(Trainer, "take_step", step_with_fault):
        return main(arguments)


if __name__ == "__main__":
    sys.exit(run())
