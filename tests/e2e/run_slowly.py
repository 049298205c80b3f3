"""Run `dist-llm` with training steps that take SECONDS longer.

    python -m tests.e2e.run_slowly SECONDS train ...

Tests that send a signal during training, or compare times, start this program.
"""

import signal
import sys
import time
from unittest.mock import patch


def run() -> None:
    """Run the command of the command line with slow steps."""
    # The command also blocks SIGUSR1, but only after the imports of this program.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    from dist_llm.cli import run as run_command
    from dist_llm.training.trainer import Trainer

    original_step, delay_seconds = Trainer.take_step, float(sys.argv.pop(1))

    def slow_step(self: Trainer) -> None:
        time.sleep(delay_seconds)
        original_step(self)

    with patch.object(Trainer, "take_step", slow_step):
        run_command()


if __name__ == "__main__":
    run()
