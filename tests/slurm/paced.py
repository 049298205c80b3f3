"""`python -m tests.slurm.paced ...`: the command, with steps of a tenth of a second at least."""

import time
from unittest.mock import patch

from dist_llm.cli import run as command
from dist_llm.train.loop import Trainer

SECONDS = 0.15


def run() -> None:
    step = Trainer.step

    def slow(self: Trainer) -> None:
        time.sleep(SECONDS)
        step(self)

    with patch.object(Trainer, "step", slow):
        command()


if __name__ == "__main__":
    run()
