"""Write metric rows as TensorBoard events."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dist_llm.observe.metrics import MetricsRow

NO_SCALARS = {"step", "sample", "event", "busy_seconds"}


class TensorBoard:
    """Event files in `directory`. TensorBoard hides events after `resumed_step`, which a killed run left there."""

    def __init__(self, directory: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # slow to import: only rank 0 pays

        self.writer = SummaryWriter(str(directory), purge_step=resumed_step + 1)

    def __call__(self, rows: Sequence[MetricsRow]) -> None:
        for row in rows:
            group = "heldout" if "heldout_loss" in row else "train"
            for name, value in row.items():
                if name not in NO_SCALARS:
                    self.writer.add_scalar(f"{group}/{name}", value, row["step"])
            if "sample" in row:
                # Indented, so that Markdown shows the text unchanged.
                text = "\n".join("    " + line for line in row["sample"].splitlines())
                self.writer.add_text("heldout/sample", text, row["step"])
            if "busy_seconds" in row:
                self.writer.add_histogram("train/busy_seconds", np.asarray(row["busy_seconds"]), row["step"])
            if "event" in row:
                self.writer.add_text("train/event", row["event"], row["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
