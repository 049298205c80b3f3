"""Measure how long a run takes to its first step, and which stages take that time.

Each round runs `train` twice on a small corpus for one step, in new processes. One process is the command, timed from
its start to its exit (`command_seconds`). The other is a short program that imports in a fixed order and prints the
time at the end of each stage:

  interpreter    until the first line of Python runs
  torch          import torch
  imports        import dist_llm and its other dependencies
  config         read, check and resolve the command line and the YAML file
  data           open the devices, the corpus, the data history and the log files
  model          build the engine: model, initial values, optimizer
  loader         build the loader and the trainer: metrics, TensorBoard, the matmul rate for MFU
  first_step     batch, forward, backward, update
  checkpoint     save the checkpoint; the corpus has no held-out text to evaluate
  exit           until the process has ended

Before the rounds, one process runs with -X importtime. Python then reports the time of each module, and takes slightly
longer. The results have these times:

  late_import_seconds       modules that a stage after `imports` imports
  dist_llm_import_seconds   all modules of dist_llm
  dist_llm_seconds          our own code until the first step: the modules of dist_llm, and the stages from `config` to
                            `loader` without their late imports

Prints one JSON line per stage (medians over the rounds), and one per package and per module of dist_llm that takes
longest to import. The goal: the first step within 8 seconds, of which our own code takes less than 1 second.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from measure import choose_device
from results import Results, format_table, make_parser, parse_options

REPOSITORY = Path(__file__).parents[1]
GOAL_SECONDS, GOAL_DIST_LLM_SECONDS = 8.0, 1.0
STAGE_PREFIX = "startup.py: "  # of a line on stderr: the prefix, the stage, the time of its end in seconds
STAGED_TRAINING_SCRIPT = f"""\
import sys, time


def mark(stage):
    print(f"{STAGE_PREFIX}{{stage}} {{time.time()}}", file=sys.stderr, flush=True)


mark("interpreter")
import torch
mark("torch")
from dist_llm import cli
from dist_llm.training import run, settings
mark("imports")


def mark_calls(owner, name, stage_ended_before="", stage_ended_after=""):
    function = getattr(owner, name)

    def marked(*args, **kwargs):
        if stage_ended_before:
            mark(stage_ended_before)
        result = function(*args, **kwargs)
        if stage_ended_after:
            mark(stage_ended_after)
        return result

    setattr(owner, name, marked)


mark_calls(settings, "read_config", stage_ended_after="config")

mark_calls(run, "build_engine", stage_ended_before="data", stage_ended_after="model")

mark_calls(run.Trainer, "take_step", stage_ended_before="loader", stage_ended_after="first_step")

mark_calls(run.Trainer, "run", stage_ended_after="checkpoint")
cli.run()
"""
IMPORT_STAGES = ("interpreter", "torch", "imports")
STAGES = (*IMPORT_STAGES, "config", "data", "model", "loader", "first_step", "checkpoint", "exit")
DIST_LLM_STAGES = ("config", "data", "model", "loader")


@dataclass
class ImportSeconds:
    """The seconds of imports: by package, by module of dist_llm, and late imports by stage."""

    by_package: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    by_dist_llm_module: dict[str, float] = field(default_factory=dict)
    late_by_stage: dict[str, float] = field(default_factory=dict)


def main() -> None:
    """Measure all rounds, and print the rows and the tables."""
    options = parse_arguments()
    results = Results("startup", choose_device())
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare_corpus(folder)
        _, import_lines = measure_stages(folder, options, "imports", python_flags=["-X", "importtime"])
        rounds: list[dict[str, float]] = []
        for round_index in range(options.rounds):
            stage_seconds, _ = measure_stages(folder, options, f"stages-{round_index}", python_flags=[])
            command_seconds = measure_command(folder, options, f"command-{round_index}")
            rounds.append({**stage_seconds, "command_seconds": command_seconds})
    medians = {name: statistics.median(seconds[name] for seconds in rounds) for name in rounds[0]}
    import_seconds = sum_imports(import_lines)
    summary = summarize(medians, import_seconds)
    for stage in STAGES:
        late_import_seconds = import_seconds.late_by_stage.get(stage, 0.0)
        results.add({"stage": stage, "seconds": medians[stage], "late_import_seconds": late_import_seconds})
    for package, seconds in sorted(import_seconds.by_package.items(), key=lambda item: -item[1])[: options.top]:
        results.add({"package": package, "seconds": seconds})
    for module, seconds in sorted(import_seconds.by_dist_llm_module.items(), key=lambda item: -item[1])[: options.top]:
        results.add({"module": module, "seconds": seconds})
    results.add(summary)
    results.finish(make_report(results, summary), options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--config",
        type=Path,
        default=REPOSITORY / "configs/debug.yaml",
        help="config of the run; default: configs/debug.yaml",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind; default: %(default)s")
    parser.add_argument(
        "--top", type=int, default=10, help="number of packages and modules to show; default: %(default)s"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys: compile=true")
    return parse_options(parser)


def prepare_corpus(folder: Path) -> None:
    """Prepare a small corpus in `folder/data` from the README of this repository, repeated."""
    (folder / "text.txt").write_bytes((REPOSITORY / "README.md").read_bytes() * 40)
    arguments = ["prepare", "--source", "text.txt", "--tokenizer", "byte", "--heldout-fraction", "0", "--out", "data"]
    subprocess.run(
        [sys.executable, "-m", "dist_llm", *arguments],
        cwd=folder,
        env=make_environment(),
        check=True,
        capture_output=True,
    )


def make_environment() -> dict[str, str]:
    """Return the environment with this source tree first in PYTHONPATH."""
    return {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def make_train_arguments(options: argparse.Namespace, run_name: str) -> list[str]:
    """Return the command-line arguments of `train` for one step."""
    keys = ["data.path=data", f"run.dir={run_name}", "run.steps=1", "log.every=1"]
    return ["train", "--config", str(options.config.resolve()), *options.overrides, *keys]


def measure_command(folder: Path, options: argparse.Namespace, run_name: str) -> float:
    """Run `train` as a command and return its seconds."""
    start_time = time.perf_counter()
    command = [sys.executable, "-m", "dist_llm", *make_train_arguments(options, run_name)]
    subprocess.run(command, cwd=folder, env=make_environment(), check=True, capture_output=True)
    return time.perf_counter() - start_time


def measure_stages(
    folder: Path, options: argparse.Namespace, run_name: str, python_flags: list[str]
) -> tuple[dict[str, float], list[str]]:
    """Run the program that prints the stages; return the seconds of each stage, and the lines on stderr."""
    stage_start = time.time()
    command = [sys.executable, *python_flags, "-c", STAGED_TRAINING_SCRIPT, *make_train_arguments(options, run_name)]
    completed = subprocess.run(command, cwd=folder, env=make_environment(), check=True, capture_output=True, text=True)
    exit_time = time.time()
    lines = completed.stderr.splitlines()
    stages_and_ends = [line.removeprefix(STAGE_PREFIX).split() for line in lines if line.startswith(STAGE_PREFIX)]
    stage_seconds: dict[str, float] = {}
    for stage, end in [*stages_and_ends, ["exit", str(exit_time)]]:
        stage_seconds[stage], stage_start = float(end) - stage_start, float(end)
    assert list(stage_seconds) == list(STAGES), f"stages in another order: {list(stage_seconds)}"
    return stage_seconds, lines


def sum_imports(lines: list[str]) -> ImportSeconds:
    """Sum up the seconds of the imports that -X importtime reports in these lines.

    A line is `import time: microseconds of the module | cumulative | name`, with the name indented by its depth.
    """
    import_seconds = ImportSeconds()
    seconds_in_stage = 0.0
    for line in lines:
        if line.startswith(STAGE_PREFIX):
            stage = line.removeprefix(STAGE_PREFIX).split()[0]
            if stage not in IMPORT_STAGES:
                import_seconds.late_by_stage[stage] = seconds_in_stage
            seconds_in_stage = 0.0
        elif line.startswith("import time:") and "self [us]" not in line:
            module_micros, _, name = (field.strip() for field in line.removeprefix("import time:").split("|"))
            seconds = int(module_micros) / 1e6
            seconds_in_stage += seconds
            import_seconds.by_package[name.partition(".")[0]] += seconds
            if name.startswith("dist_llm"):
                import_seconds.by_dist_llm_module[name] = seconds
    return import_seconds


def summarize(medians: dict[str, float], import_seconds: ImportSeconds) -> dict[str, Any]:
    """Sum up the seconds until the first step ends, and those of our own code; see the docstring of the module."""
    to_first_step_seconds = sum(medians[stage] for stage in STAGES[: STAGES.index("first_step") + 1])
    dist_llm_import_seconds = import_seconds.by_package.get("dist_llm", 0.0)
    stage_seconds = sum(
        max(0.0, medians[stage] - import_seconds.late_by_stage.get(stage, 0.0)) for stage in DIST_LLM_STAGES
    )
    return {
        "to_first_step_seconds": to_first_step_seconds,
        "dist_llm_seconds": dist_llm_import_seconds + stage_seconds,
        "dist_llm_import_seconds": dist_llm_import_seconds,
        "command_seconds": medians["command_seconds"],
    }


def make_report(results: Results, summary: dict[str, Any]) -> str:
    """Format the tables and the goals."""
    sections = []
    for kind in ("stage", "package", "module"):
        rows = [row for row in results.rows if kind in row]
        if kind == "stage":
            cells = [[row[kind], f"{row['seconds']:.3f}", f"{row['late_import_seconds']:.3f}"] for row in rows]
            sections.append(format_table([kind, "seconds", "late imports"], cells))
        else:
            cells = [[row[kind], f"{row['seconds']:.3f}"] for row in rows]
            sections.append(format_table([kind, "seconds"], cells))
    sections.append(
        f"to the first step: {summary['to_first_step_seconds']:.2f} s (the goal: {GOAL_SECONDS}), of which our own "
        f"code {summary['dist_llm_seconds']:.2f} s (the goal: {GOAL_DIST_LLM_SECONDS}); "
        f"the command, to its exit: {summary['command_seconds']:.2f} s"
    )
    return "\n\n".join(sections)


if __name__ == "__main__":
    main()
