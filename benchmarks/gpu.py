"""Everything that a GPU is needed for, in one command and at most eight minutes: checks of values, then figures.

`make gpu` starts it; docs/gpu.md says how, and what the rows are. Rows run in the order of their value, each in a child
process under a time limit, and are written as they come to gpu-cuda.json in --write (benchmarks/results).

Exit codes: 0, every row that ran is right; 1, a check failed or a row broke; 2, this machine cannot run it; 130,
interrupted, with the table of what there is. Rows for which no time is left are skipped, and the table says so.

  python benchmarks/gpu.py
  python benchmarks/gpu.py --device cpu --write runs/gpu             the CPU in the GPU's place: tiny sizes
  python benchmarks/gpu.py --device pretended                        no device at all (pretend.py): shapes and memory
  python benchmarks/gpu.py --rows "step fp32" "attention flex"       these rows alone
"""

import argparse
import itertools
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

import pretend
from gpu_context import Context
from gpu_report import GpuResults, report
from gpu_rows import ROWS, Row
from gpu_workers import Outcome, RowProcesses, run_pretended
from results import DIRECTORY

BUDGET_SECONDS = {"cuda": 470.0, "cpu": 3600.0, "pretended": math.inf}
CPU_PATIENCE = 10  # times longer than on a GPU may a row take on a CPU
RunRow = Callable[[Row, float], list[Outcome]]


def main() -> int:
    """Run the rows, print the table, return the exit code."""
    begin = time.monotonic()
    options = arguments()
    if options.device == "pretended":
        pretend.preload()
    elif options.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: torch sees no GPU. `DEVICE=cpu make gpu` runs the rows on the CPU, at tiny sizes", file=sys.stderr
        )
        return 2
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    signal.signal(signal.SIGTERM, _interrupt)
    tiny = options.tiny or options.device == "cpu"
    context = Context(options.device, tiny, options.write)
    words = [word for word in sys.argv[1:] if word != f"--commit={options.commit}"]
    results = GpuResults(context, f"python benchmarks/gpu.py {shlex.join(words)}".strip(), options.commit)
    chosen = [row for row in ROWS if not options.rows or row.name in options.rows]
    code = 0
    budget = BUDGET_SECONDS[options.device] if options.budget is None else options.budget
    processes = RowProcesses(context)
    run = processes.run if context.has_values else lambda row, _: run_pretended(row, context)
    try:
        run_rows(chosen, results, run, lambda: budget - (time.monotonic() - begin))
    except KeyboardInterrupt:
        code = 130
    finally:
        processes.close()
    print(f"\n{report(results)}\n\n{summary(results)}", file=sys.stderr)
    return code or int(any(row["outcome"] == "failed" for row in results.rows))


def arguments() -> argparse.Namespace:
    """The command line."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--device", choices=("cuda", "cpu", "pretended"), default="cuda", help="default: cuda")
    top.add_argument("--tiny", action="store_true", help="tiny sizes, as on a CPU")
    top.add_argument("--budget", type=float, help="seconds; default: 470 on a GPU, 3600 on a CPU")
    top.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], metavar="ROW", help="default: all")
    top.add_argument("--write", type=Path, default=DIRECTORY, metavar="DIR", help="default: benchmarks/results")
    top.add_argument("--commit", default="", help="the commit of this tree, where it is not under git")
    return top.parse_args()


def run_rows(rows: Sequence[Row], results: GpuResults, run: RunRow, left: Callable[[], float]) -> None:
    """Each row that there is time for; its outcomes are kept before the next one starts."""
    for row in rows:
        seconds_left = left()
        if seconds_left < row.expected:
            reason = (
                f"{max(seconds_left, 0):.0f} s of the budget are left, and it is expected to take {row.expected:.0f}"
            )
            results.add({"row": row.name, "kind": row.kind, "seconds": 0.0, "outcome": "skipped", "error": reason})
            continue
        start = time.monotonic()
        found = run(row, min(row.limit * (CPU_PATIENCE if results.context.kind == "cpu" else 1), seconds_left))
        seconds = time.monotonic() - start
        for each, share in zip(found, itertools.repeat(seconds / len(found))):
            results.add(entry(row, each, share, len(found) > 1 or "row" in each))


def entry(row: Row, outcome: Outcome, seconds: float, several: bool) -> Outcome:
    """An outcome as it is kept. One of several of a row has its own name, and its own `seconds` of a call."""
    head: Outcome = {"row": row.name, "kind": row.kind, "seconds": seconds}
    if several:
        head["row"] = f"{row.name}, {outcome.get('row', '')}"
        if "seconds" in outcome:
            head["row_seconds"] = outcome["seconds"]
    return {**head, **{name: value for name, value in outcome.items() if name not in ("row", "seconds")}}


def summary(results: GpuResults) -> str:
    """The last lines."""
    outcomes = [row["outcome"] for row in results.rows]
    counts = ", ".join(f"{outcomes.count(each)} {each}" for each in sorted(set(outcomes)))
    return f"rows: {counts}\nwritten: {results.path}\nWhere to send it: docs/gpu.md"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
