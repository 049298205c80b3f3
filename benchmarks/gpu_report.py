"""The results of `gpu.py`: a file that is complete after every row, and the table at the end."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dist_llm.io.atomic import replace_file
from gpu_context import Context
from gpu_environment import hardware
from results import DIRECTORY, Results, format_table

GIB = 2**30
TRACED = "gpu-fake.json"


class GpuResults(Results):
    """`FOLDER/gpu-KIND.json`, rewritten with each row, so that a killed run keeps its rows.

    `commit` is used if the source tree is not under git. Training rows get the peak that was traced beforehand.
    """

    def __init__(self, context: Context, command: str, commit: str) -> None:
        super().__init__("gpu", context.device if context.has_values else torch.device("cpu"))
        self.context, self.command = context, command
        self.path = context.folder / f"gpu-{context.kind}.json"
        self.about = {**self.facts(), **hardware(context), "tiny": context.tiny}
        if self.about["git_commit"] == "unknown" and commit:
            self.about["git_commit"] = commit
        self.traced = {} if context.tiny or not context.has_values else traced_peaks()
        self._write()

    def add(self, row: Mapping[str, Any]) -> None:
        """Print a row and write it."""
        traced = self.traced.get(row["row"])
        super().add(row if traced is None else {**row, "traced_peak": traced})
        self._write()

    def _write(self) -> None:
        content = {"command": self.command, "machine": self.about, "rows": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, json.dumps(content, indent=1).encode() + b"\n")


def traced_peaks(path: Path = DIRECTORY / TRACED) -> dict[str, int]:
    """Return {row: bytes} of the committed run on the fake GPU; empty if there is none."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {row["row"]: row["traced_peak"] for row in rows if "traced_peak" in row}


def report(results: GpuResults) -> str:
    """Format one table, and below it the gaps of the profile and all failures."""
    rows = [(row["row"], row["outcome"], f"{row['seconds']:.1f}", *_figures(row)) for row in results.rows]
    header = ("row", "outcome", "s", "tok/s", "MFU", "step ms", "peak GiB", "traced GiB", "TFLOP/s", "GB/s")
    sections = [results.machine(), format_table(header, rows)]
    sections += [_gaps(row) for row in results.rows if row.get("gaps")]
    sections += [
        f"{row['row']}: {row['outcome']}: {_find_reason(row)}" for row in results.rows if row["outcome"] != "ok"
    ]
    return "\n\n".join(sections)


def _figures(row: Mapping[str, Any]) -> list[str]:
    """Format the cells of a row; empty if it has no such figure."""
    seconds = row.get("step_seconds", row.get("row_seconds"))
    if "kernel_window_micros" in row:
        seconds = row["kernel_window_micros"] / 1e6
    scaled = (
        (row.get("tokens_per_second"), 1, "{:,.0f}"),
        (row.get("mfu"), 1, "{:.3f}"),
        (seconds, 1e-3, "{:,.2f}"),
        (row.get("peak"), GIB, "{:.2f}"),
        (row.get("traced_peak"), GIB, "{:.2f}"),
        (row.get("tflops", row["bf16_matmul"] / 1e12 if "bf16_matmul" in row else None), 1, "{:,.1f}"),
        (row.get("bytes_per_second", row.get("copy_bytes_per_second")), 1e9, "{:,.0f}"),
    )
    return ["" if value is None else form.format(value / unit) for value, unit, form in scaled]


def _gaps(row: Mapping[str, Any]) -> str:
    """Format the largest gaps of a profile, and its largest kernels."""
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
    kernels = [(each["name"], each["calls"], f"{each['micros'] / 1e3:.2f}") for each in row["largest_kernels"]]
    window_millis = row["kernel_window_micros"] / 1e3
    what = f"{row['row']}: {row['idle_fraction']:.1%} of {window_millis:.1f} ms without a kernel; the largest gaps"
    gaps = format_table(("previous kernel", "next kernel", "last host operator", "at ms", "us"), cells)
    return f"{what}\n{gaps}\n\n{format_table(('kernel', 'calls', 'ms'), kernels)}"


def _find_reason(row: Mapping[str, Any]) -> str:
    """Return the failures of a check, or the end of a traceback."""
    if row.get("broken"):
        return "; ".join(row["broken"])
    return str(row.get("error", "")).strip()
