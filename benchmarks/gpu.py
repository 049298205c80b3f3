"""Run all checks and measurements that need a GPU, in one command of at most eight minutes.

`make gpu` starts this program; docs/gpu.md explains its results. The cases (gpu_cases.py) run in order of importance,
each in a child process with a time limit. When a case ends, its result, one row or several, is written to
gpu-cuda.json in the folder --write (default: benchmarks/results). A case is skipped if too little time is left.

Exit codes: 0, no case failed; 1, a case failed; 2, this machine cannot run the command; 130, interrupted, after the
table of the finished cases. A case that runs out of memory is not a failure: the cases are sized for 80 GB.

  python benchmarks/gpu.py
  python benchmarks/gpu.py --device cpu --write runs/gpu             use the CPU in place of the GPU, at tiny sizes
  python benchmarks/gpu.py --device fake                             use no device (fake_gpu.py): shapes and memory
  python benchmarks/gpu.py --cases "step fp32" "attention flex"      run only these cases
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
from gpu_cases import CASES, BenchmarkCase
from gpu_context import CaseContext
from gpu_report import GpuResults, make_report
from gpu_workers import CaseProcesses, Outcome, run_on_fake_gpu
from results import DIRECTORY

BUDGET_SECONDS = {"cuda": 470.0, "cpu": 3600.0, "fake": math.inf}
CPU_LIMIT_FACTOR = 10  # a CPU multiplies `limit_seconds` by this factor; the limits are sized for a GPU
RunCase = Callable[[BenchmarkCase, float], list[Outcome]]


def main() -> int:
    """Run the cases, print the table, and return the exit code."""
    start_time = time.monotonic()
    options = parse_arguments()
    if options.device == "fake":
        fake_gpu.preload()
    elif options.device == "cuda" and not torch.cuda.is_available():
        print(
            "error: torch sees no GPU. `DEVICE=cpu make gpu` runs the cases on the CPU, at tiny sizes", file=sys.stderr
        )
        return 2
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    signal.signal(signal.SIGTERM, _interrupt)
    tiny = options.tiny or options.device == "cpu"
    context = CaseContext(options.device, tiny, options.write)
    command_args = [argument for argument in sys.argv[1:] if argument != f"--commit={options.commit}"]
    results = GpuResults(context, f"python benchmarks/gpu.py {shlex.join(command_args)}".strip(), options.commit)
    selected_cases = [case for case in CASES if not options.case_names or case.name in options.case_names]
    exit_code = 0
    budget_seconds = BUDGET_SECONDS[options.device] if options.budget is None else options.budget
    processes = CaseProcesses(context)
    run_case = processes.run if context.has_values else lambda case, _: run_on_fake_gpu(case, context)
    try:
        run_cases(selected_cases, results, run_case, lambda: budget_seconds - (time.monotonic() - start_time))
    except KeyboardInterrupt:
        exit_code = 130
    finally:
        processes.close()
    print(f"\n{make_report(results)}\n\n{make_summary(results)}", file=sys.stderr)
    return exit_code or int(any(row["outcome"] == "failed" for row in results.rows))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu", "fake"), default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="use tiny sizes, as on a CPU")
    parser.add_argument("--budget", type=float, help="time for all cases, in seconds; default: 470 (CPU: 3600)")
    parser.add_argument(
        "--cases",
        "--rows",  # the former name
        dest="case_names",
        nargs="+",
        choices=[case.name for case in CASES],
        metavar="CASE",
        help="run only these cases; default: all",
    )
    parser.add_argument(
        "--write",
        type=Path,
        default=DIRECTORY,
        metavar="DIR",
        help="folder of the results; default: benchmarks/results",
    )
    parser.add_argument("--commit", default="", help="commit to record if this source tree is not under git")
    return parser.parse_args()


def run_cases(
    cases: Sequence[BenchmarkCase], results: GpuResults, run_case: RunCase, get_seconds_left: Callable[[], float]
) -> None:
    """Run each case for which enough time is left, and record its outcomes before the next case starts."""
    for case in cases:
        seconds_left = get_seconds_left()
        if seconds_left < case.expected_seconds:
            budget = f"{max(seconds_left, 0):.0f} s of the time budget are left"
            reason = f"needs about {case.expected_seconds:.0f} s, but {budget}"
            results.add({"row": case.name, "kind": case.kind, "seconds": 0.0, "outcome": "skipped", "error": reason})
            continue
        start_time = time.monotonic()
        limit_seconds = case.limit_seconds * (CPU_LIMIT_FACTOR if results.context.device_kind == "cpu" else 1)
        outcomes = run_case(case, min(limit_seconds, seconds_left))
        elapsed_seconds = time.monotonic() - start_time
        for outcome in outcomes:
            has_own_name = len(outcomes) > 1 or "row" in outcome
            results.add(make_row(case, outcome, elapsed_seconds / len(outcomes), has_own_name=has_own_name))


def make_row(case: BenchmarkCase, outcome: Outcome, seconds: float, has_own_name: bool) -> Outcome:
    """Make the row of an outcome in the results.

    With `has_own_name` the case has several outcomes: the row gets the name of the case and of the outcome. `seconds`
    is the time of the case per outcome. If the outcome reports the seconds of one call, they become `row_seconds`.
    """
    row: Outcome = {"row": case.name, "kind": case.kind, "seconds": seconds}
    if has_own_name:
        row["row"] = f"{case.name}, {outcome.get('row', '')}"
        if "seconds" in outcome:
            row["row_seconds"] = outcome["seconds"]
    return {**row, **{name: value for name, value in outcome.items() if name not in ("row", "seconds")}}


def make_summary(results: GpuResults) -> str:
    """Format the lines below the table: the count of each outcome and the path of the file."""
    outcomes = [row["outcome"] for row in results.rows]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted(set(outcomes)))
    return f"rows: {counts}\nwritten: {results.path}\nWhere to send it: docs/gpu.md"


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    """End the program as on Ctrl-C."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
