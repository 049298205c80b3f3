"""`python -m tests.slurm.paced ...`: the command, with steps of a quarter of a second at least."""

import signal
import time
from unittest.mock import patch

SECONDS = 0.25


def run() -> None:
    # As the command itself does, but before what is patched is imported.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    from dist_llm.cli import run as command
    from dist_llm.train.loop import Trainer

    step = Trainer.step

    def slow(self: Trainer) -> None:
        time.sleep(SECONDS)
        step(self)

    with patch.object(Trainer, "step", slow):
        command()


if __name__ == "__main__":
    run()
