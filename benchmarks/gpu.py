"""Run all checks and figures that need a GPU, in one command of at most eight minutes.

`make gpu` starts it; docs/gpu.md describes the rows. A row is one case of the benchmark (gpu_rows.py). Rows run in
order of importance, each in a child process with a time limit. Each is written to gpu-cuda.json in --write
(benchmarks/results) when it ends. A row for which too little time is left is skipped, and the table says so.

Exit codes: 0, no check and no row failed; 1, a check or a row failed; 2, this machine cannot run the command; 130,
interrupted, with the table of the finished rows. A row that runs out of memory does not fail the command: the rows are
sized for 80 GB, and on a smaller GPU that is a result, not an error.

  python benchmarks/gpu.py
  python benchmarks/gpu.py --device cpu --write runs/gpu             use the CPU in place of the GPU, at tiny sizes
  python benchmarks/gpu.py --device fake                             use no device (fake_gpu.py): shapes and memory
  python benchmarks/gpu.py --rows "step fp32" "attention flex"       run only these rows
"""

import argparse
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import torch

import fake_gpu
from gpu_context import Context
from gpu_report import GpuResults, report
from gpu_rows import ROWS, Row
from gpu_workers import Outcome, RowProcesses, run_on_fake_gpu
from results import DIRECTORY

BUDGET_SECONDS = {"cuda": 470.0, "cpu": 3600.0, "fake": math.inf}
CPU_LIMIT_FACTOR = 10  # on a CPU a row may take this many times its `limit_seconds`, which is meant for a GPU
RunRow = Callable[[Row, float], list[Outcome]]


def main() -> int:
    """Run the rows, print the table, and return the exit code."""
    start_time = time.monotonic()
    options = parse_arguments()
    if options.device == "fake":
        fake_gpu.preload()
    elif options.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: torch sees no GPU. `DEVICE=cpu make gpu` runs the rows on the CPU, at tiny sizes", file=sys.stderr
        )
        return 2
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    signal.signal(signal.SIGTERM, _interrupt)
    tiny = options.tiny or options.device == "cpu"
    context = Context(options.device, tiny, options.write)
    command_args = [argument for argument in sys.argv[1:] if argument != f"--commit={options.commit}"]
    results = GpuResults(context, f"python benchmarks/gpu.py {shlex.join(command_args)}".strip(), options.commit)
    selected_rows = [row for row in ROWS if not options.rows or row.name in options.rows]
    code = 0
    budget = BUDGET_SECONDS[options.device] if options.budget is None else options.budget
    processes = RowProcesses(context)
    run = processes.run if context.has_values else lambda row, _: run_on_fake_gpu(row, context)
    try:
        run_rows(selected_rows, results, run, lambda: budget - (time.monotonic() - start_time))
    except KeyboardInterrupt:
        code = 130
    finally:
        processes.close()
    print(f"\n{report(results)}\n\n{make_summary(results)}", file=sys.stderr)
    return code or int(any(row["outcome"] == "failed" for row in results.rows))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu", "fake"), default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, as on a CPU")
    parser.add_argument("--budget", type=float, help="seconds; default: 470 on a GPU, 3600 on a CPU")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], metavar="ROW", help="default: all")
    parser.add_argument("--write", type=Path, default=DIRECTORY, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--commit", default="", help="the commit of this tree, where it is not under git")
    return parser.parse_args()


def run_rows(rows: Sequence[Row], results: GpuResults, run: RunRow, get_seconds_left: Callable[[], float]) -> None:
    """Run each row for which enough time is left, and record its outcomes before the next row starts."""
    for row in rows:
        seconds_left = get_seconds_left()
        if seconds_left < row.expected_seconds:
            left = f"{max(seconds_left, 0):.0f} s of the time budget are left"
            reason = f"needs about {row.expected_seconds:.0f} s, but {left}"
            results.add({"row": row.name, "kind": row.kind, "seconds": 0.0, "outcome": "skipped", "error": reason})
            continue
        start = time.monotonic()
        limit_seconds = row.limit_seconds * (CPU_LIMIT_FACTOR if results.context.kind == "cpu" else 1)
        outcomes = run(row, min(limit_seconds, seconds_left))
        seconds = time.monotonic() - start
        for outcome in outcomes:
            has_own_name = len(outcomes) > 1 or "row" in outcome
            results.add(make_record(row, outcome, seconds / len(outcomes), has_own_name))


def make_record(row: Row, outcome: Outcome, seconds: float, has_own_name: bool) -> Outcome:
    """Make the record of an outcome. With `has_own_name` the outcome is one of several of its row and has its own name.

    An outcome's own `seconds`, of one call, become `row_seconds`.
    """
    record: Outcome = {"row": row.name, "kind": row.kind, "seconds": seconds}
    if has_own_name:
        record["row"] = f"{row.name}, {outcome.get('row', '')}"
        if "seconds" in outcome:
            record["row_seconds"] = outcome["seconds"]
    return {**record, **{name: value for name, value in outcome.items() if name not in ("row", "seconds")}}


def make_summary(results: GpuResults) -> str:
    """Format the lines below the table: the count of each outcome and the file."""
    outcomes = [row["outcome"] for row in results.rows]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes)))
    return f"rows: {counts}\nwritten: {results.path}\nWhere to send it: docs/gpu.md"


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
