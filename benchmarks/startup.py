"""Measure how long a run takes to its first step, and which stages take that time.

Each round runs `train` twice on a small corpus for one step, in new processes: once as a command, timed from its start
to its exit (`command`), and once through a short program that imports in a fixed order and prints when each stage ends,
by the clock of the parent process:

  interpreter    to the first line of Python
  torch          import torch
  imports        all other imports of training: ours, and what ours needs
  config         the command line and the YAML file: read, checked and resolved
  data           devices, corpus, history, log files
  model          the engine: model, initial values, optimizer
  loader         the loader and the loop: metrics, TensorBoard, the rate for MFU
  first_step     batch, forward, backward, update
  end            the checkpoint; there is no held-out text
  exit           to the end of the process

An earlier process runs with -X importtime, which reports the time of each module: `ours` is that of dist_llm's modules,
and `late` that of modules imported after the stage `imports`, within another stage; the reports make these times
slightly too large. `own` is all of our code until the first step: the stages from config to loader without late
imports, and the import of our modules.

Prints one JSON line per stage (medians over the rounds), and one per package that takes long to import. The goal: the
first step within 8 seconds, of which our own code takes less than 1.

  python benchmarks/startup.py
  python benchmarks/startup.py --rounds 1 --config configs/gpt2-124m.yaml data.micro_batch=1 data.global_batch=1
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from measure import choose_device
from results import Results, format_table, make_parser, parse_options

REPOSITORY = Path(__file__).parents[1]
GOAL_SECONDS, GOAL_OWN_SECONDS = 8.0, 1.0
PREFIX = "startup.py: "
STAGED_TRAINING = f"""\
import sys, time


def mark(stage):
    print(f"{PREFIX}{{stage}} {{time.time()}}", file=sys.stderr, flush=True)


mark("interpreter")
import torch
mark("torch")
from dist_llm import cli
from dist_llm.training import run, settings
mark("imports")


def mark_calls(owner, name, before="", after=""):
    function = getattr(owner, name)

    def marked(*args, **kwargs):
        if before:
            mark(before)
        result = function(*args, **kwargs)
        if after:
            mark(after)
        return result

    setattr(owner, name, marked)


mark_calls(settings, "read_config", after="config")

mark_calls(run, "build_engine", before="data", after="model")

mark_calls(run.Trainer, "step", before="loader", after="first_step")

mark_calls(run.Trainer, "run", after="end")
cli.run()
"""
STAGES = ("interpreter", "torch", "imports", "config", "data", "model", "loader", "first_step", "end", "exit")
OWN_STAGES = ("config", "data", "model", "loader")


def main() -> None:
    """Measure and print."""
    options = parse_arguments()
    results = Results("startup", choose_device())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder)
        _, import_lines = measure_stages(folder, options, "noted", ["-X", "importtime"])
        rounds: list[dict[str, float]] = []
        for number in range(options.rounds):
            stage_seconds, _ = measure_stages(folder, options, f"staged{number}", [])
            rounds.append({**stage_seconds, "command": measure_command(folder, options, f"plain{number}")})
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    imports_by_kind = sum_imports(import_lines)
    summary = summarize(medians, imports_by_kind)
    for stage in STAGES:
        results.add({"stage": stage, "seconds": medians[stage], "late": imports_by_kind["late"].get(stage, 0.0)})
    for package, seconds in sorted(imports_by_kind["packages"].items(), key=lambda item: -item[1])[: options.top]:
        results.add({"package": package, "seconds": seconds})
    for module, seconds in sorted(imports_by_kind["modules"].items(), key=lambda item: -item[1])[: options.top]:
        results.add({"module": module, "seconds": seconds})
    results.add(summary)
    results.finish(make_report(results, summary), options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--config", type=Path, default=REPOSITORY / "configs/debug.yaml", help="default: debug.yaml")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--top", type=int, default=10, help="packages and modules shown; default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train: compile=true")
    return parse_options(parser)


def prepare(folder: Path) -> None:
    """Prepare a small corpus: the repository's README, repeated."""
    (folder / "text.txt").write_bytes((REPOSITORY / "README.md").read_bytes() * 40)
    arguments = [
        "prepare",
        "--source",
        "text.txt",
        "--tokenizer",
        "byte",
        "--heldout-fraction",
        "0",
        "--out",
        "data",
    ]
    subprocess.run(
        [sys.executable, "-m", "dist_llm", *arguments],
        cwd=folder,
        env=environment(),
        check=True,
        capture_output=True,
    )


def environment() -> dict[str, str]:
    """Return the environment, with this source tree first in the path."""
    return {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def train_arguments(options: argparse.Namespace, name: str) -> list[str]:
    """Return the arguments of `train`."""
    keys = ["data.path=data", f"run.dir={name}", "run.steps=1", "log.every=1"]
    return ["train", "--config", str(options.config.resolve()), *options.overrides, *keys]


def measure_command(folder: Path, options: argparse.Namespace, name: str) -> float:
    """Time the command itself."""
    start_time = time.perf_counter()
    command = [sys.executable, "-m", "dist_llm", *train_arguments(options, name)]
    subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True)
    return time.perf_counter() - start_time


def measure_stages(
    folder: Path, options: argparse.Namespace, name: str, flags: list[str]
) -> tuple[dict[str, float], list[str]]:
    """Return the seconds of each stage, and the lines on stderr."""
    stage_start = time.time()
    command = [sys.executable, *flags, "-c", STAGED_TRAINING, *train_arguments(options, name)]
    completed = subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True, text=True)
    lines = completed.stderr.splitlines()
    ends = [line.removeprefix(PREFIX).split() for line in lines if line.startswith(PREFIX)] + [
        ["exit", str(time.time())]
    ]
    stage_seconds: dict[str, float] = {}
    for stage, end in ends:
        stage_seconds[stage], stage_start = float(end) - stage_start, float(end)
    assert list(stage_seconds) == list(STAGES), f"stages in another order: {list(stage_seconds)}"
    return stage_seconds, lines


def sum_imports(lines: list[str]) -> dict[str, dict[str, float]]:
    """Sum up seconds of imports by package, by module of dist_llm, and by the stage in which late imports occur.

    A line is `import time: own microseconds | cumulative | name`, with the name indented by its depth.
    """
    packages: dict[str, float] = defaultdict(float)
    modules: dict[str, float] = {}
    late: dict[str, float] = {}
    pending = 0.0
    for line in lines:
        if line.startswith(PREFIX):
            stage = line.removeprefix(PREFIX).split()[0]
            if stage not in STAGES[:3]:
                late[stage] = pending
            pending = 0.0
        elif line.startswith("import time:") and "self [us]" not in line:
            own, _, name = (field.strip() for field in line.removeprefix("import time:").split("|"))
            seconds = int(own) / 1e6
            pending += seconds
            packages[name.partition(".")[0]] += seconds
            if name.startswith("dist_llm"):
                modules[name] = seconds
    return {"packages": dict(packages), "modules": modules, "late": late}


def summarize(medians: dict[str, float], imports_by_kind: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Sum up the stages to the first step, and our own part."""
    to_first = sum(medians[stage] for stage in STAGES[: STAGES.index("first_step") + 1])
    our_imports = imports_by_kind["packages"].get("dist_llm", 0.0)
    own = our_imports + sum(max(0.0, medians[stage] - imports_by_kind["late"].get(stage, 0.0)) for stage in OWN_STAGES)
    return {"to_first_step": to_first, "own": own, "ours": our_imports, "command": medians["command"]}


def make_report(results: Results, summary: dict[str, Any]) -> str:
    """Format the tables and the goals."""
    sections = []
    for kind in ("stage", "package", "module"):
        rows = [row for row in results.rows if kind in row]
        late = ["late imports"] if kind == "stage" else []
        cells = [[r[kind], f"{r['seconds']:.3f}", *([f"{r['late']:.3f}"] if late else [])] for r in rows]
        sections.append(format_table([kind, "seconds", *late], cells))
    sections.append(
        f"to the first step: {summary['to_first_step']:.2f} s (the goal: {GOAL_SECONDS}), of which our own code "
        f"{summary['own']:.2f} s (the goal: {GOAL_OWN_SECONDS}); the command, to its exit: {summary['command']:.2f} s"
    )
    return "\n\n".join(sections)


if __name__ == "__main__":
    main()
