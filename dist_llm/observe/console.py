"""Console output and log files: one line per logging interval, a progress bar on a terminal, one log file per rank."""

import logging
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dist_llm.launch.world import World
from dist_llm.observe.metrics import MetricsRow

log = logging.getLogger("dist_llm")

# Printed after an MFU above 100%. MFU (model FLOPs utilization) is a fraction of the peak FLOP/s of the device.
PEAK_TOO_LOW_HINT = " (the peak rate is underestimated: set log.peak_tflops)"


def start_logging(directory: Path, world: World) -> None:
    """Log to one file per rank in `directory`, and on rank 0 also to stderr."""
    directory.mkdir(parents=True, exist_ok=True)
    rank_formatter = logging.Formatter(f"%(asctime)s rank {world.rank} {world.host} %(levelname)s %(message)s")
    file_handler = _LogFile(directory / f"rank_{world.rank:05d}.log", encoding="utf-8")
    file_handler.setFormatter(rank_formatter)
    stop_logging()
    log.addHandler(file_handler)
    if world.is_main:
        console_handler = logging.StreamHandler(sys.stderr)
        console_handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(console_handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def stop_logging() -> None:
    """Close the handlers that `start_logging` opened."""
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    """A log file. After an error, it prints the error to stderr once and drops all further records.

    A log that cannot be written does not end the run. If the disk is full, the metrics file ends the run.
    """

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exception()
        if not isinstance(error, OSError) or self.stream is None:
            super().handleError(record)
            return
        null_fd = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null_fd, self.stream.fileno())  # the stream writes its buffer and all further records to /dev/null
        os.close(null_fd)
        print(f"{self.baseFilename}: {error.strerror}; logging to this file has stopped", file=sys.stderr, flush=True)


class ConsoleSink:
    """A sink of metrics (metrics.py) that prints one line per logging interval, and one line per event.

    A terminal also shows a progress bar below the lines.
    """

    def __init__(self, num_steps: int, num_steps_done: int) -> None:
        self.num_steps = num_steps
        console = Console(stderr=True)
        self.bar: Progress | None = None
        if console.is_terminal:
            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("steps, time left"))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console)
            self.task = self.bar.add_task("train", total=num_steps, completed=num_steps_done)
            self.bar.start()

    def __call__(self, rows: Sequence[MetricsRow]) -> None:
        row = rows[-1]
        lines = [event_row["event"] for event_row in rows if "event" in event_row]
        if "heldout_loss" in row or "loss" in row:
            lines.append(self._format_heldout(row) if "heldout_loss" in row else self._format_train(row))
        for line in lines:
            if self.bar is None:
                log.info(line)
            else:
                self.bar.update(self.task, completed=row["step"])
                self.bar.console.print(line, highlight=False)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _format_train(self, row: MetricsRow) -> str:
        seconds_left = (self.num_steps - row["step"]) * row["step_seconds"]
        return (
            f"step {row['step']:>{len(str(self.num_steps))}}/{self.num_steps}  loss {row['loss']:.4f}  "
            f"lr {row['lr']:.2e}  grad norm {row['grad_norm']:.3f}  {row['tokens_per_second']:,.0f} tokens/s  "
            f"MFU {row['mfu']:.1%}{PEAK_TOO_LOW_HINT if row['mfu'] > 1 else ''}  ETA {_format_clock(seconds_left)}"
        )

    def _format_heldout(self, row: MetricsRow) -> str:
        bits = row.get("heldout_bits_per_byte")
        return (
            f"step {row['step']}  held-out loss {row['heldout_loss']:.4f}  perplexity {row['heldout_perplexity']:.2f}"
            + (f"  bits per byte {bits:.4f}" if bits is not None else "")
        )


def _format_clock(seconds: float) -> str:
    """Format a duration as hours:minutes:seconds."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
