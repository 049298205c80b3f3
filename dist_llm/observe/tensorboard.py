"""Write rows of metrics as TensorBoard events."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dist_llm.observe.metrics import MetricsRow
from dist_llm.observe.router_metrics import draw_load

# Keys of a row that are not written as scalars.
NON_SCALARS = {"step", "sample", "event", "busy_seconds", "expert_load"}


class TensorBoard:
    """A sink that writes event files to `directory`.

    TensorBoard hides events after `resumed_step`, which a killed run may have left there.
    """

    def __init__(self, directory: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # slow to import, and only rank 0 needs it

        self.writer = SummaryWriter(str(directory), purge_step=resumed_step + 1)

    def __call__(self, rows: Sequence[MetricsRow]) -> None:
        for row in rows:
            group = "heldout" if "heldout_loss" in row else "train"
            for name, value in row.items():
                if name not in NON_SCALARS:
                    self.writer.add_scalar(f"{group}/{name}", value, row["step"])
            if "sample" in row:
                # Markdown shows indented text unchanged.
                text = "\n".join("    " + line for line in row["sample"].splitlines())
                self.writer.add_text("heldout/sample", text, row["step"])
            if "busy_seconds" in row:
                self.writer.add_histogram("train/busy_seconds", np.asarray(row["busy_seconds"]), row["step"])
            if "expert_load" in row:
                heat_map = draw_load(row["expert_load"])
                self.writer.add_image("train/expert_load", heat_map, row["step"], dataformats="HWC")
            if "event" in row:
                self.writer.add_text("train/event", row["event"], row["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
