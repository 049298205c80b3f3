"""What faults cost: seconds from a rank's death, or its standing still, to the next step; and goodput against a run
that nobody disturbed.

A run of two ranks on this machine under `torchrun --max-restarts` meets each fault at some step: a rank killed by
SIGKILL, one stopped by SIGSTOP, which the watchdog ends. Steps take at least --pace seconds, as those of a large model
would. Prints one JSON line per fault on stdout, then a table on stderr.
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
PACED = """\
import sys, time
from dist_llm.cli import main
from dist_llm.train.trainer import Trainer

step = Trainer.step


def slow(self):
    time.sleep({pace})
    step(self)


Trainer.step = slow
sys.exit(main())
"""
HANG_SECONDS = 3.0


def main() -> None:
    """Measure each fault and print."""
    options = parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        prepare(place)
        straight = run(place, "straight", options, None)
        found = []
        for fault in options.faults:
            got = run(place, fault, options, fault)
            found.append({"fault": fault, **got, "goodput": round(straight["seconds"] / got["seconds"], 3)})
            print(json.dumps(found[-1]), flush=True)
    what = f"steps of {options.pace} s, a checkpoint every {options.every} steps, watchdog after {HANG_SECONDS} s"
    print(f"\n{what}", file=sys.stderr)
    print(f"{'fault':>8} {'to the next step, s':>20} {'steps lost':>11} {'goodput':>8}", file=sys.stderr)
    for row in found:
        figures = f"{row['recovery_seconds']:>20.1f} {row['steps_lost']:>11} {row['goodput']:>8}"
        print(f"{row['fault']:>8} {figures}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    top.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS), help="default: all")
    top.add_argument("--steps", type=int, default=60, help="default: %(default)s")
    top.add_argument(
        "--at",
        type=int,
        default=23,
        help="the step after which the fault comes, none that is saved; default: %(default)s",
    )
    top.add_argument("--every", type=int, default=5, help="steps between checkpoints; default: %(default)s")
    top.add_argument("--pace", type=float, default=0.3, help="least seconds of a step; default: %(default)s")
    return top


def prepare(place: Path) -> None:
    """A small corpus."""
    (place / "text").mkdir()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:20]:
        (place / "text" / file.name).write_bytes(file.read_bytes())
    words = ["prepare", "--source", "text", "--tokenizer", "byte", "--out", "data"]
    ours = [sys.executable, "-m", "dist_llm", *words]
    subprocess.run(ours, cwd=place, env=environment(), check=True, capture_output=True)


def environment() -> dict[str, str]:
    """Of torchrun: ranks that start again meet at a new place, where no address of a dead one is left."""
    own = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return {**os.environ, **own}


def run(place: Path, name: str, options: argparse.Namespace, fault: str | None) -> dict[str, float]:
    """Seconds of the whole; with a fault, those from it to the first step beyond, and the steps taken twice."""
    paced = place / "paced.py"
    paced.write_text(PACED.format(pace=options.pace))
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3", str(paced)]
    words += ["train", "--config", str(REPOSITORY / "configs/debug.yaml"), "data.path=data", f"run.dir={name}"]
    words += [f"run.steps={options.steps}", f"checkpoint.every={options.every}", "log.every=1", "eval.windows=8"]
    words += [f"run.hang_seconds={HANG_SECONDS}"]
    begin = time.monotonic()
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(words, cwd=place, env=environment(), stdout=nowhere, stderr=nowhere)
    found: dict[str, float] = {}
    if fault:
        wait(process, lambda: steps(place / name) >= options.at)
        before, hit = steps(place / name), time.monotonic()
        os.kill(ranks(process.pid)[1], FAULTS[fault])
        # Metrics beyond the checkpoint that the run goes on from are dropped first, so the count falls.
        wait(process, lambda: steps(place / name) < before)
        resumed = steps(place / name)
        wait(process, lambda: steps(place / name) > resumed)
        found = {"recovery_seconds": round(time.monotonic() - hit, 2), "steps_lost": before - resumed}
    if process.wait():
        raise SystemExit(f"{name}: torchrun ended with {process.returncode}")
    return {**found, "seconds": round(time.monotonic() - begin, 2)}


def steps(run: Path) -> int:
    """The newest in the run's metrics; 0 before there are any."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if '"loss"' in line), default=0)


def ranks(torchrun: int) -> list[int]:
    """The processes that torchrun started."""
    children = [path.read_text().split() for path in Path(f"/proc/{torchrun}/task").glob("*/children")]
    return sorted(int(child) for each in children for child in each)


def wait(process: "subprocess.Popen[bytes]", ready: Callable[[], bool]) -> None:
    """Until it is, or the run is over."""
    while not ready():
        if process.poll() is not None:
            raise SystemExit("the run ended before the fault could be measured; give it more --steps")
        time.sleep(0.02)


if __name__ == "__main__":
    main()
