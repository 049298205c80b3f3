"""Measure the cost of faults: seconds from the death or the stop of a rank to the next step, and goodput.

The program starts runs of two ranks on this machine under `torchrun --max-restarts`. At step --at, one rank is killed
(SIGKILL), or stopped (SIGSTOP) until the watchdog kills it. Goodput is the duration of a run without a fault over the
duration of the run with the fault. Steps take at least --pace seconds, like steps of a large model. Prints one JSON
line per fault on stdout, then a table on stderr.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
FAULTS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
PACED_TRAINING_SCRIPT = """\
import sys, time
from dist_llm.cli import main
from dist_llm.training.trainer import Trainer

step = Trainer.take_step


def slow_step(self):
    time.sleep({pace})
    step(self)


Trainer.take_step = slow_step
sys.exit(main())
"""
HANG_SECONDS = 3.0  # the timeout of the watchdog, run.hang_seconds


def main() -> None:
    """Measure and print each fault."""
    options = make_parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare_corpus(folder)
        undisturbed = measure_run(folder, "uninterrupted", options, fault=None)
        rows = []
        for fault in options.faults:
            result = measure_run(folder, fault, options, fault)
            goodput = round(undisturbed["seconds"] / result["seconds"], 3)
            rows.append({"fault": fault, **result, "goodput": goodput})
            print(json.dumps(rows[-1]), flush=True)
    conditions = f"steps of {options.pace} s, a checkpoint every {options.every} steps, watchdog after {HANG_SECONDS} s"
    print(f"\n{conditions}", file=sys.stderr)
    print(f"{'fault':>8} {'to the next step, s':>20} {'steps lost':>11} {'goodput':>8}", file=sys.stderr)
    for row in rows:
        figures = f"{row['recovery_seconds']:>20.1f} {row['steps_lost']:>11} {row['goodput']:>8}"
        print(f"{row['fault']:>8} {figures}", file=sys.stderr)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="default: all")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run; default: %(default)s")
    parser.add_argument(
        "--at",
        type=int,
        default=23,
        help="step after which the fault happens, not a step with a checkpoint; default: %(default)s",
    )
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints; default: %(default)s")
    parser.add_argument("--pace", type=float, default=0.3, help="minimum seconds of a step; default: %(default)s")
    return parser


def prepare_corpus(folder: Path) -> None:
    """Prepare a small corpus in `folder/data`."""
    (folder / "text").mkdir()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:20]:
        (folder / "text" / file.name).write_bytes(file.read_bytes())
    arguments = ["prepare", "--source", "text", "--tokenizer", "byte", "--out", "data"]
    command = [sys.executable, "-m", "dist_llm", *arguments]
    subprocess.run(command, cwd=folder, env=make_environment(), check=True, capture_output=True)


def make_environment() -> dict[str, str]:
    """Make the environment of torchrun. Restarted ranks use a new store, which has no addresses of dead ranks."""
    changes = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return {**os.environ, **changes}


def measure_run(folder: Path, name: str, options: argparse.Namespace, fault: str | None) -> dict[str, float]:
    """Run training under torchrun and return its `seconds`.

    With a fault, also return `recovery_seconds`, from the fault to the first new step, and `steps_lost`.
    """
    program = folder / "paced.py"
    program.write_text(PACED_TRAINING_SCRIPT.format(pace=options.pace))
    arguments = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3", str(program)]
    arguments += ["train", "--config", str(REPOSITORY / "configs/debug.yaml"), "data.path=data", f"run.dir={name}"]
    arguments += [f"run.steps={options.steps}", f"checkpoint.every={options.every}", "log.every=1", "eval.windows=8"]
    arguments += [f"run.hang_seconds={HANG_SECONDS}"]
    start_time = time.monotonic()
    devnull = subprocess.DEVNULL
    process = subprocess.Popen(arguments, cwd=folder, env=make_environment(), stdout=devnull, stderr=devnull)
    figures: dict[str, float] = {}
    if fault:
        wait_until(process, lambda: read_last_step(folder / name) >= options.at)
        steps_before, fault_time = read_last_step(folder / name), time.monotonic()
        os.kill(list_ranks(process.pid)[1], FAULTS[fault])
        # A resumed run first drops the metrics after its checkpoint, so the last step in the metrics falls.
        wait_until(process, lambda: read_last_step(folder / name) < steps_before)
        resume_step = read_last_step(folder / name)
        wait_until(process, lambda: read_last_step(folder / name) > resume_step)
        recovery_seconds = round(time.monotonic() - fault_time, 2)
        figures = {"recovery_seconds": recovery_seconds, "steps_lost": steps_before - resume_step}
    if process.wait():
        raise SystemExit(f"{name}: torchrun ended with exit code {process.returncode}")
    return {**figures, "seconds": round(time.monotonic() - start_time, 2)}


def read_last_step(run_dir: Path) -> int:
    """Return the last step in the metrics of a run, or 0."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if '"loss"' in line), default=0)


def list_ranks(torchrun_pid: int) -> list[int]:
    """List the process ids of the ranks that torchrun started."""
    child_ids = [path.read_text().split() for path in Path(f"/proc/{torchrun_pid}/task").glob("*/children")]
    return sorted(int(child_id) for ids_of_thread in child_ids for child_id in ids_of_thread)


def wait_until(process: "subprocess.Popen[bytes]", is_ready: Callable[[], bool]) -> None:
    """Wait until `is_ready` returns true; raise SystemExit if the run ends before."""
    while not is_ready():
        if process.poll() is not None:
            raise SystemExit("the run ended before the fault could be measured; increase --steps")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
