"""`python -m tests.chaos.rank DIRECTORY PACED train ...`: the command, with two things added to each step.

Up to step PACED it takes a tenth of a second more. And where DIRECTORY holds a file `nan_HOST`, a rank on that host
takes the file away and puts a NaN into one of its weights.
"""

import socket
import sys
import time
from pathlib import Path
from unittest.mock import patch

import torch

from dist_llm.cli import main
from dist_llm.sharded import to_local
from dist_llm.train.trainer import Trainer

SECONDS = 0.15


def order(directory: Path, host: str) -> Path:
    """The file that orders a NaN."""
    return directory / f"nan_{host}"


def run() -> int:
    directory, paced, *arguments = sys.argv[1:]
    ordered, step = order(Path(directory), socket.gethostname()), Trainer.step

    def changed(self: Trainer) -> None:
        if self.progress.step < int(paced):
            time.sleep(SECONDS)
        if ordered.exists():
            ordered.unlink()
            weight = to_local(next(self.engine.named_parameters())[1].detach())
            weight.view(-1)[0] = torch.nan
        step(self)

    with patch.object(Trainer, "step", changed):
        return main(arguments)


if __name__ == "__main__":
    sys.exit(run())
