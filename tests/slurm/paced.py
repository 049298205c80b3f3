"""`python -m tests.slurm.paced ...`: the command, with steps of a tenth of a second at least."""

import sys
import time
from unittest.mock import patch

from dist_llm.cli import main
from dist_llm.train.loop import Trainer

SECONDS = 0.15


def run() -> int:
    step = Trainer.step

    def slow(self: Trainer) -> None:
        time.sleep(SECONDS)
        step(self)

    with patch.object(Trainer, "step", slow):
        return main()


if __name__ == "__main__":
    sys.exit(run())
