"""Write the results of `gpu.py`: a file that is rewritten after each row, and the table at the end.

"Traced" means: predicted by a run on the fake GPU (fake_gpu.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dist_llm.io.atomic import replace_file
from gpu_context import CaseContext
from gpu_environment import describe_hardware
from results import DIRECTORY, Results, format_table

GIB = 2**30
TRACED_RESULTS_FILE = "gpu-fake.json"


class GpuResults(Results):
    """The file `FOLDER/gpu-DEVICE.json`, rewritten after each row, so that a killed run keeps its rows.

    Without a git checkout, `commit` is recorded in place of git's commit. Rows of training cases also get
    `traced_peak`, the peak memory in bytes that a run on the fake GPU predicted.
    """

    def __init__(self, context: CaseContext, command: str, commit: str) -> None:
        super().__init__("gpu", context.device if context.has_values else torch.device("cpu"))
        self.context, self.command = context, command
        self.path = context.folder / f"gpu-{context.device_kind}.json"
        self.environment = {**self.collect_environment(), **describe_hardware(context), "tiny": context.tiny}
        if self.environment["git_commit"] == "unknown" and commit:
            self.environment["git_commit"] = commit
        self.traced_peaks = {} if context.tiny or not context.has_values else read_traced_peaks()
        self._write()

    def add(self, row: Mapping[str, Any]) -> None:
        """Print a row and write it."""
        traced_peak = self.traced_peaks.get(row["row"])
        super().add(row if traced_peak is None else {**row, "traced_peak": traced_peak})
        self._write()

    def _write(self) -> None:
        content = {"command": self.command, "machine": self.environment, "rows": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, json.dumps(content, indent=1).encode() + b"\n")


def read_traced_peaks(path: Path = DIRECTORY / TRACED_RESULTS_FILE) -> dict[str, int]:
    """Return the predicted peak memory in bytes by row, from the committed run on the fake GPU; {} without one."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {row["row"]: row["traced_peak"] for row in rows if "traced_peak" in row}


def make_report(results: GpuResults) -> str:
    """Format the machine, the table, the largest gaps of each profiled row, and the reasons of rows that are not ok."""
    cells = [(row["row"], row["outcome"], f"{row['seconds']:.1f}", *_format_figures(row)) for row in results.rows]
    header = ("row", "outcome", "s", "tok/s", "MFU", "step ms", "peak GiB", "traced GiB", "TFLOP/s", "GB/s")
    sections = [results.describe_machine(), format_table(header, cells)]
    sections += [_format_gaps(row) for row in results.rows if row.get("gaps")]
    sections += [
        f"{row['row']}: {row['outcome']}: {_find_reason(row)}" for row in results.rows if row["outcome"] != "ok"
    ]
    return "\n\n".join(sections)


def _format_figures(row: Mapping[str, Any]) -> list[str]:
    """Format the numeric cells of a row; a cell is empty if the row lacks the figure."""
    seconds = row.get("step_seconds", row.get("row_seconds"))  # of a step, or of one call
    if "kernel_window_micros" in row:
        seconds = row["kernel_window_micros"] / 1e6  # of the profiled steps
    values_units_formats = (
        (row.get("tokens_per_second"), 1, "{:,.0f}"),
        (row.get("mfu"), 1, "{:.3f}"),
        (seconds, 1e-3, "{:,.2f}"),
        (row.get("peak"), GIB, "{:.2f}"),
        (row.get("traced_peak"), GIB, "{:.2f}"),
        (row.get("tflops", row["bf16_matmul"] / 1e12 if "bf16_matmul" in row else None), 1, "{:,.1f}"),
        (row.get("bytes_per_second", row.get("copy_bytes_per_second")), 1e9, "{:,.0f}"),
    )
    return ["" if value is None else form.format(value / unit) for value, unit, form in values_units_formats]


def _format_gaps(row: Mapping[str, Any]) -> str:
    """Format the largest gaps of a profile and its largest kernels as two tables."""
    cells = [
        (
            gap["previous_kernel"],
            gap["next_kernel"],
            gap["last_host_operator"],
            f"{gap['start'] / 1e3:.2f}",
            gap["micros"],
        )
        for gap in row["gaps"]
    ]
    kernels = [(kernel["name"], kernel["calls"], f"{kernel['micros'] / 1e3:.2f}") for kernel in row["largest_kernels"]]
    window_millis = row["kernel_window_micros"] / 1e3
    title = f"{row['row']}: {row['idle_fraction']:.1%} of {window_millis:.1f} ms without a kernel; the largest gaps"
    gaps = format_table(("previous kernel", "next kernel", "last host operator", "at ms", "us"), cells)
    return f"{title}\n{gaps}\n\n{format_table(('kernel', 'calls', 'ms'), kernels)}"


def _find_reason(row: Mapping[str, Any]) -> str:
    """Return the failures of a check, or the error of a case that raised or was skipped."""
    if row.get("broken"):
        return "; ".join(row["broken"])
    return str(row.get("error", "")).strip()
