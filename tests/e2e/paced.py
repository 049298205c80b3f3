"""`python -m tests.e2e.paced SECONDS ...`: run the command with steps that take SECONDS longer."""

import signal
import sys
import time
from unittest.mock import patch


def run() -> None:
    # The command blocks SIGUSR1, too, but this program must block it before it imports the patched modules.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    from dist_llm.cli import run as command
    from dist_llm.training.trainer import Trainer

    step, seconds = Trainer.take_step, float(sys.argv.pop(1))

    def slow_step(self: Trainer) -> None:
        time.sleep(seconds)
        step(self)

    with patch.object(Trainer, "take_step", slow_step):
        command()


if __name__ == "__main__":
    run()
