"""How long a run takes to its first step, and where that goes.

Each round starts `train` on a small corpus as a process of its own, for one step, and twice: as a user would, timed
from outside from the start of the process to its exit (`command`); and through a few lines that import in an order of
their own and note when each stage ended, by the same clock as whoever started the process:

  interpreter    to the first line of Python
  torch          import torch
  imports        all else that training imports: ours, and what ours needs
  config         the command line and the YAML file, read, checked and resolved
  data           devices, corpus, history, log files
  model          the engine: model, initial values, optimizer
  loader         the loader and the loop: metrics, TensorBoard, the rate that MFU is over
  first_step     batch, forward, backward, update
  end            the checkpoint; there is no held-out text
  exit           to the end of the process

A process before all others runs with -X importtime, which says what each module took by itself: `ours` is what modules
of dist_llm took, and `late` what was imported after the stage `imports`, that is in the midst of another; those seconds
are a little too many, since noting them costs time, too. `own` is all of our own code to the first step: the stages
from config to loader without late imports, and the import of our modules.

Prints one JSON line per stage (medians over the rounds), and one per package that takes long to import. The goal: the
first step within 8 seconds, of which our own code less than 1.

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

from measure import any_device
from results import Results, parse, parser, table

REPOSITORY = Path(__file__).parents[1]
GOAL_SECONDS, GOAL_OWN_SECONDS = 8.0, 1.0
SAYS = "startup.py: "
STAGED = f"""\
import sys, time


def mark(stage):
    print(f"{SAYS}{{stage}} {{time.time()}}", file=sys.stderr, flush=True)


mark("interpreter")
import torch
mark("torch")
from dist_llm import cli
from dist_llm.train import run, settings
mark("imports")


def marked(place, name, before="", after=""):
    function = getattr(place, name)

    def wrapped(*arguments, **named):
        if before:
            mark(before)
        found = function(*arguments, **named)
        if after:
            mark(after)
        return found

    setattr(place, name, wrapped)


marked(settings, "read_config", after="config")
marked(run, "build_engine", before="data", after="model")
marked(run.Trainer, "step", before="loader", after="first_step")
marked(run.Trainer, "run", after="end")
cli.run()
"""
STAGES = ("interpreter", "torch", "imports", "config", "data", "model", "loader", "first_step", "end", "exit")
OURS = ("config", "data", "model", "loader")


def main() -> None:
    """Measure and print."""
    options = arguments()
    results = Results("startup", any_device())
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        prepare(place)
        _, noted = stages(place, options, "noted", ["-X", "importtime"])
        rounds: list[dict[str, float]] = []
        for number in range(options.rounds):
            staged, _ = stages(place, options, f"staged{number}", [])
            rounds.append({**staged, "command": command(place, options, f"plain{number}")})
    medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    imported = imports(noted)
    summary = summed(medians, imported)
    for stage in STAGES:
        results.add({"stage": stage, "seconds": medians[stage], "late": imported["late"].get(stage, 0.0)})
    for package, taken in sorted(imported["packages"].items(), key=lambda item: -item[1])[: options.top]:
        results.add({"package": package, "seconds": taken})
    for module, taken in sorted(imported["modules"].items(), key=lambda item: -item[1])[: options.top]:
        results.add({"module": module, "seconds": taken})
    results.add(summary)
    results.finish(report(results, summary), options.write)


def arguments() -> argparse.Namespace:
    """The command line."""
    top = parser(__doc__)
    top.add_argument("--config", type=Path, default=REPOSITORY / "configs/debug.yaml", help="default: debug.yaml")
    top.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    top.add_argument("--top", type=int, default=10, help="packages and modules shown; default: %(default)s")
    top.add_argument("overrides", nargs="*", metavar="key=value", help="as for train: compile=true")
    return parse(top)


def prepare(place: Path) -> None:
    """A small corpus: the repository's own page, again and again."""
    (place / "text.txt").write_bytes((REPOSITORY / "README.md").read_bytes() * 40)
    words = ["prepare", "--source", "text.txt", "--tokenizer", "byte", "--heldout-fraction", "0", "--out", "data"]
    subprocess.run(
        [sys.executable, "-m", "dist_llm", *words], cwd=place, env=environment(), check=True, capture_output=True
    )


def environment() -> dict[str, str]:
    """This one, with this source tree first."""
    return {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def words(options: argparse.Namespace, name: str) -> list[str]:
    """What `train` is told."""
    keys = ["data.path=data", f"run.dir={name}", "run.steps=1", "log.every=1"]
    return ["train", "--config", str(options.config.resolve()), *options.overrides, *keys]


def command(place: Path, options: argparse.Namespace, name: str) -> float:
    """Seconds of the command itself."""
    begin = time.perf_counter()
    run = [sys.executable, "-m", "dist_llm", *words(options, name)]
    subprocess.run(run, cwd=place, env=environment(), check=True, capture_output=True)
    return time.perf_counter() - begin


def stages(place: Path, options: argparse.Namespace, name: str, flags: list[str]) -> tuple[dict[str, float], list[str]]:
    """Seconds of each stage, and what the process wrote on stderr."""
    begin = time.time()
    run = [sys.executable, *flags, "-c", STAGED, *words(options, name)]
    done = subprocess.run(run, cwd=place, env=environment(), check=True, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    ends = [line.removeprefix(SAYS).split() for line in lines if line.startswith(SAYS)] + [["exit", str(time.time())]]
    found: dict[str, float] = {}
    for stage, end in ends:
        found[stage], begin = float(end) - begin, float(end)
    assert list(found) == list(STAGES), f"stages in another order: {list(found)}"
    return found, lines


def imports(lines: list[str]) -> dict[str, dict[str, float]]:
    """Seconds of imports by package, by module of ours, and by the stage that they fell into where that is a late one.

    A line is `import time: own microseconds | with all that it imported | name`, the name set in by its depth.
    """
    packages: dict[str, float] = defaultdict(float)
    modules: dict[str, float] = {}
    late: dict[str, float] = {}
    pending = 0.0
    for line in lines:
        if line.startswith(SAYS):
            stage = line.removeprefix(SAYS).split()[0]
            if stage not in STAGES[:3]:
                late[stage] = pending
            pending = 0.0
        elif line.startswith("import time:") and "self [us]" not in line:
            own, _, name = (part.strip() for part in line.removeprefix("import time:").split("|"))
            taken = int(own) / 1e6
            pending += taken
            packages[name.partition(".")[0]] += taken
            if name.startswith("dist_llm"):
                modules[name] = taken
    return {"packages": dict(packages), "modules": modules, "late": late}


def summed(medians: dict[str, float], imported: dict[str, dict[str, float]]) -> dict[str, Any]:
    """The whole, and our own part of it."""
    to_first = sum(medians[stage] for stage in STAGES[: STAGES.index("first_step") + 1])
    ours = imported["packages"].get("dist_llm", 0.0)
    own = ours + sum(max(0.0, medians[stage] - imported["late"].get(stage, 0.0)) for stage in OURS)
    return {"to_first_step": to_first, "own": own, "ours": ours, "command": medians["command"]}


def report(results: Results, summary: dict[str, Any]) -> str:
    """The tables, and how far the goals are met."""
    parts = []
    for kind in ("stage", "package", "module"):
        rows = [row for row in results.rows if kind in row]
        late = ["late imports"] if kind == "stage" else []
        cells = [[r[kind], f"{r['seconds']:.3f}", *([f"{r['late']:.3f}"] if late else [])] for r in rows]
        parts.append(table([kind, "seconds", *late], cells))
    parts.append(
        f"to the first step: {summary['to_first_step']:.2f} s (the goal: {GOAL_SECONDS}), of which our own code "
        f"{summary['own']:.2f} s (the goal: {GOAL_OWN_SECONDS}); the command, to its exit: {summary['command']:.2f} s"
    )
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
