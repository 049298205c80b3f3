"""Train all layouts of configs/layouts and compare their loss curves with that of one process.

Each config is a run of `torchrun -m dist_llm train` with as many processes as its layout needs, all on this machine:
this takes minutes on two cores and shows correctness, not speed. The corpus is prepared first if it is missing. Prints
one JSON line per layout, with the largest relative difference of its losses and gradient norms from those of one
process over all steps. With --docs, also writes curves.md and curves.png.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from dist_llm.config.derive import AXES

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs" / "layouts"
ONE = "one"


@dataclass(frozen=True)
class Curve:
    """A run's name, number of processes, rows of metrics.jsonl, and duration."""

    name: str
    ranks: int
    rows: list[dict[str, Any]]
    seconds: float

    def column(self, key: str) -> list[float]:
        return [row[key] for row in self.rows]


def main() -> None:
    """Train, print, and write with --docs."""
    options = make_parser().parse_args()
    corpus = prepare_corpus(options.data)
    names = [ONE, *sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != ONE)]
    with tempfile.TemporaryDirectory() as scratch:
        one, *layouts = [train_layout(name, Path(scratch), corpus, options.overrides) for name in names]
    for curve in layouts:
        print(json.dumps({"layout": curve.name, "ranks": curve.ranks} | max_differences(curve, one)), flush=True)
    if options.docs:
        options.docs.mkdir(parents=True, exist_ok=True)
        plot(one, layouts, options.docs / "curves.png")
        (options.docs / "curves.md").write_text(make_page(one, layouts))


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, default=Path("data/stdlib"), help="default: %(default)s")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write curves.md and curves.png into it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train: run.steps=10")
    return parser


def prepare_corpus(corpus: Path) -> Path:
    """Return the corpus, prepared from Python's standard library if it does not exist."""
    if not (corpus / "manifest.json").exists():
        source = ("--source", "python-stdlib", "--tokenizer", "bpe:4096")
        run(sys.executable, "-m", "dist_llm", "prepare", *source, "--out", str(corpus))
    return corpus.resolve()


def train_layout(name: str, scratch: Path, corpus: Path, overrides: list[str]) -> Curve:
    """Train configs/layouts/NAME.yaml into a fresh directory."""
    path = CONFIGS / f"{name}.yaml"
    layout = yaml.safe_load(path.read_text()).get("parallel", {})
    ranks = math.prod(layout.get(axis, 1) for axis in AXES)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    directory = scratch / name
    start_time = time.perf_counter()
    run(
        *(sys.executable, *launcher, "-m", "dist_llm", "train", "--config", str(path)),
        *(f"run.dir={directory}", f"data.path={corpus}", *overrides),
    )
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return Curve(name, ranks, [row for row in rows if "loss" in row], time.perf_counter() - start_time)


def run(*command: str) -> None:
    """Run a command with one thread per process, as torchrun sets it; its output goes to stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    print("+", *command, file=sys.stderr, flush=True)
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=True)


def max_differences(curve: Curve, one: Curve) -> dict[str, float]:
    """Return the largest relative differences from one process, over all steps, of the loss and the gradient norm."""
    return {key: max(relative_differences(curve, one, key)) for key in ("loss", "grad_norm")}


def relative_differences(curve: Curve, one: Curve, key: str) -> list[float]:
    """Return each step's difference from one process, relative to its value."""
    pairs = zip(curve.column(key), one.column(key), strict=True)
    return [abs(actual - expected) / abs(expected) for actual, expected in pairs]


def plot(one: Curve, layouts: list[Curve], file: Path) -> None:
    """Plot the losses above, and the differences from one process below."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 2), layout="tight")
    above.plot(one.column("step"), one.column("loss"), color="0.8", linewidth=8, label="one process")
    for number, curve in enumerate(layouts):
        style = {"color": f"C{number}", "label": f"{curve.name}, {curve.ranks} ranks"}
        # Dashes have different offsets, so that all of several equal curves are visible.
        above.plot(
            curve.column("step"), curve.column("loss"), linestyle=(number * 3, (3, 3 * len(layouts) - 3)), **style
        )
        below.semilogy(
            curve.column("step"), [max(each, 1e-9) for each in relative_differences(curve, one, "loss")], **style
        )
    above.set_ylabel("loss, nats per token")
    above.legend(handlelength=6)
    below.axhline(1e-4, color="black", linestyle=":", linewidth=1)
    below.annotate("what the tests allow", (1, 1e-4), xytext=(0, -12), textcoords="offset points", fontsize=9)
    below.set_ylim(1e-9, 1e-3)
    below.set_ylabel("relative difference\nfrom one process")
    below.set_xlabel("step")
    figure.savefig(file, dpi=120)


def make_page(one: Curve, layouts: list[Curve]) -> str:
    """Format curves.md."""
    rows = [
        f"| {curve.name} | {curve.ranks} | {curve.column('loss')[0]:.6f} | {curve.column('loss')[-1]:.6f} | {columns} |"
        for curve in (one, *layouts)
        for columns in (
            [" | ".join("" if curve is one else f"{value:.1e}" for value in max_differences(curve, one).values())]
        )
    ]
    lines = [
        "# Loss curves of layouts",
        "",
        "Compare the training curves of four layouts on eight ranks with one process. A curve that leaves the grey one",
        "would show a wrong gradient.",
        "",
        f"All runs train the decoder of `configs/layouts/one.yaml` for {len(one.rows)} steps on Python's standard",
        "library, from the same weights and on the same samples. The eight ranks shared the cores of one machine, so",
        "this page says nothing about speed.",
        "",
        "![losses and their differences](curves.png)",
        "",
        "The differences are relative to one process, and the largest over all steps.",
        "`tests/e2e/test_layout_configs.py` allows 1e-4 for the loss.",
        "",
        "| config | processes | first loss | last loss | loss, difference | gradient norm, difference |",
        "| --- | --- | --- | --- | --- | --- |",
        *rows,
        "",
        f"torch {torch.__version__}, fp32, CPU with gloo, {os.cpu_count()} cores. This page is written by:",
        "",
        "```sh",
        "python benchmarks/curves.py --docs docs",
        "```",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
