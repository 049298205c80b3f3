"""`python -m tests.e2e.paced SECONDS ...`: the command, with steps that take so much longer."""

import signal
import sys
import time
from unittest.mock import patch


def run() -> None:
    # As the command itself does, but before what is patched is imported.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    from dist_llm.cli import run as command
    from dist_llm.train.trainer import Trainer

    step, seconds = Trainer.step, float(sys.argv.pop(1))

    def slow(self: Trainer) -> None:
        time.sleep(seconds)
        step(self)

    with patch.object(Trainer, "step", slow):
        command()


if __name__ == "__main__":
    run()
