"""Measure what faults cost: seconds from a rank's death or halt to the next step, and goodput.

Runs of two ranks on this machine under `torchrun --max-restarts` have a fault at some step: one rank is killed by
SIGKILL, or stopped by SIGSTOP and then ended by the watchdog. Goodput is relative to a run without a fault. Steps take
at least --pace seconds, like those of a large model. Prints one JSON line per fault on stdout, then a table on stderr.
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
PACED_TRAINING = """\
import sys, time
from dist_llm.cli import main
from dist_llm.training.trainer import Trainer

step = Trainer.take_step


def slow(self):
    time.sleep({pace})
    step(self)


Trainer.take_step = slow
sys.exit(main())
"""
HANG_SECONDS = 3.0


def main() -> None:
    """Measure and print each fault."""
    options = make_parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        uninterrupted_run = run(folder, "uninterrupted", options, None)
        rows = []
        for fault in options.faults:
            result = run(folder, fault, options, fault)
            rows.append(
                {"fault": fault, **result, "goodput": round(uninterrupted_run["seconds"] / result["seconds"], 3)}
            )
            print(json.dumps(rows[-1]), flush=True)
    what = f"steps of {options.pace} s, a checkpoint every {options.every} steps, watchdog after {HANG_SECONDS} s"
    print(f"\n{what}", file=sys.stderr)
    print(f"{'fault':>8} {'to the next step, s':>20} {'steps lost':>11} {'goodput':>8}", file=sys.stderr)
    for row in rows:
        figures = f"{row['recovery_seconds']:>20.1f} {row['steps_lost']:>11} {row['goodput']:>8}"
        print(f"{row['fault']:>8} {figures}", file=sys.stderr)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="default: all")
    parser.add_argument("--steps", type=int, default=60, help="default: %(default)s")
    parser.add_argument(
        "--at",
        type=int,
        default=23,
        help="the step after which the fault comes, none that is saved; default: %(default)s",
    )
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints; default: %(default)s")
    parser.add_argument("--pace", type=float, default=0.3, help="least seconds of a step; default: %(default)s")
    return parser


def prepare(folder: Path) -> None:
    """Prepare a small corpus."""
    (folder / "text").mkdir()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:20]:
        (folder / "text" / file.name).write_bytes(file.read_bytes())
    arguments = ["prepare", "--source", "text", "--tokenizer", "byte", "--out", "data"]
    command = [sys.executable, "-m", "dist_llm", *arguments]
    subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True)


def environment() -> dict[str, str]:
    """Make torchrun's environment, in which restarted ranks use a new store, without addresses of dead ranks."""
    changes = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return {**os.environ, **changes}


def run(folder: Path, name: str, options: argparse.Namespace, fault: str | None) -> dict[str, float]:
    """Return the seconds of the run; with a fault, also those until the first new step, and the steps lost."""
    program = folder / "paced.py"
    program.write_text(PACED_TRAINING.format(pace=options.pace))
    arguments = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3", str(program)]
    arguments += ["train", "--config", str(REPOSITORY / "configs/debug.yaml"), "data.path=data", f"run.dir={name}"]
    arguments += [f"run.steps={options.steps}", f"checkpoint.every={options.every}", "log.every=1", "eval.windows=8"]
    arguments += [f"run.hang_seconds={HANG_SECONDS}"]
    start_time = time.monotonic()
    devnull = subprocess.DEVNULL
    process = subprocess.Popen(arguments, cwd=folder, env=environment(), stdout=devnull, stderr=devnull)
    figures: dict[str, float] = {}
    if fault:
        wait_until(process, lambda: read_last_step(folder / name) >= options.at)
        steps_before, fault_time = read_last_step(folder / name), time.monotonic()
        os.kill(list_ranks(process.pid)[1], FAULTS[fault])
        # Metrics after the checkpoint from which the run resumes are dropped first, so the count falls.
        wait_until(process, lambda: read_last_step(folder / name) < steps_before)
        resumed = read_last_step(folder / name)
        wait_until(process, lambda: read_last_step(folder / name) > resumed)
        figures = {"recovery_seconds": round(time.monotonic() - fault_time, 2), "steps_lost": steps_before - resumed}
    if process.wait():
        raise SystemExit(f"{name}: torchrun ended with {process.returncode}")
    return {**figures, "seconds": round(time.monotonic() - start_time, 2)}


def read_last_step(run: Path) -> int:
    """Return the newest step in the run's metrics, or 0."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if '"loss"' in line), default=0)


def list_ranks(torchrun: int) -> list[int]:
    """List the processes that torchrun started."""
    children = [path.read_text().split() for path in Path(f"/proc/{torchrun}/task").glob("*/children")]
    return sorted(int(child) for each in children for child in each)


def wait_until(process: "subprocess.Popen[bytes]", ready: Callable[[], bool]) -> None:
    """Wait until `ready` returns true or the run ends."""
    while not ready():
        if process.poll() is not None:
            raise SystemExit("the run ended before the fault could be measured; give it more --steps")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
