"""`python -m tests.e2e.faulty FAULT RANK STEP train ...`: the command, with a fault planted before a step of one rank.

raise: an exception. sleep: it goes on with nothing. stop: SIGSTOP. usr1, term: a signal to itself. nan: a weight.
"""

import os
import signal
import sys
import time
from unittest.mock import patch

import torch

from dist_llm.cli import main
from dist_llm.train.loop import Trainer

SIGNALS = {"stop": signal.SIGSTOP, "usr1": signal.SIGUSR1, "term": signal.SIGTERM}


def run() -> int:
    fault, rank, at, *arguments = sys.argv[1:]
    step = Trainer.step

    def faulty(self: Trainer) -> None:
        if self.world.rank == int(rank) and self.progress.step + 1 == int(at):
            if fault == "raise":
                raise ValueError("planted")
            if fault == "sleep":
                time.sleep(3600)
            if fault == "nan":
                next(self.engine.named_parameters())[1].data.fill_(torch.nan)
            else:
                os.kill(os.getpid(), SIGNALS[fault])
        step(self)

    with patch.object(Trainer, "step", faulty):
        return main(arguments)


if __name__ == "__main__":
    sys.exit(run())
