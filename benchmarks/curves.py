"""Train each config of configs/layouts and compare its loss curve with the curve of one process.

For each config the program runs `torchrun -m dist_llm train` with as many processes as the layout needs, on this
machine. This takes minutes on two cores and shows correctness, not speed. The program prepares the corpus if it is
missing. It prints one JSON line per layout: the largest relative difference of losses and of gradient norms from one
process, over all steps. With --docs it also writes curves.md and curves.png.
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
ONE_PROCESS_CONFIG = "one"


@dataclass(frozen=True)
class Curve:
    """The result of a run: the name of its config, the number of ranks, the rows of metrics.jsonl, the duration."""

    name: str
    ranks: int
    rows: list[dict[str, Any]]
    seconds: float

    def read_column(self, key: str) -> list[float]:
        """Return a metric at each logged step."""
        return [row[key] for row in self.rows]


def main() -> None:
    """Train all layouts, print the differences, and write the page with --docs."""
    options = make_parser().parse_args()
    corpus = prepare_corpus(options.data)
    layout_names = sorted(path.stem for path in CONFIGS.glob("*.yaml") if path.stem != ONE_PROCESS_CONFIG)
    with tempfile.TemporaryDirectory() as scratch:
        reference, *curves = [
            train_layout(name, Path(scratch), corpus, options.overrides) for name in (ONE_PROCESS_CONFIG, *layout_names)
        ]
    for curve in curves:
        differences = find_max_differences(curve, reference)
        print(json.dumps({"layout": curve.name, "ranks": curve.ranks} | differences), flush=True)
    if options.docs:
        options.docs.mkdir(parents=True, exist_ok=True)
        plot(reference, curves, options.docs / "curves.png")
        (options.docs / "curves.md").write_text(make_page(reference, curves))


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, default=Path("data/stdlib"), help="the corpus; default: %(default)s")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write curves.md and curves.png into this folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys: run.steps=10")
    return parser


def prepare_corpus(corpus: Path) -> Path:
    """Prepare a corpus from the standard library of Python if it does not exist; return its absolute path."""
    if not (corpus / "manifest.json").exists():
        source = ("--source", "python-stdlib", "--tokenizer", "bpe:4096")
        run_command(sys.executable, "-m", "dist_llm", "prepare", *source, "--out", str(corpus))
    return corpus.resolve()


def train_layout(name: str, scratch: Path, corpus: Path, overrides: list[str]) -> Curve:
    """Train configs/layouts/NAME.yaml with as many ranks as its layout needs, and read its curve."""
    config_path = CONFIGS / f"{name}.yaml"
    layout = yaml.safe_load(config_path.read_text()).get("parallel", {})
    ranks = math.prod(layout.get(axis, 1) for axis in AXES)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    run_dir = scratch / name
    start_time = time.perf_counter()
    run_command(
        *(sys.executable, *launcher, "-m", "dist_llm", "train", "--config", str(config_path)),
        *(f"run.dir={run_dir}", f"data.path={corpus}", *overrides),
    )
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return Curve(name, ranks, [row for row in rows if "loss" in row], time.perf_counter() - start_time)


def run_command(*command: str) -> None:
    """Run a command with one thread per process, like torchrun; its output goes to stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    print("+", *command, file=sys.stderr, flush=True)
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=True)


def find_max_differences(curve: Curve, reference: Curve) -> dict[str, float]:
    """Return the largest relative difference from one process over all steps, of the loss and of the gradient norm."""
    return {key: max(compute_relative_differences(curve, reference, key)) for key in ("loss", "grad_norm")}


def compute_relative_differences(curve: Curve, reference: Curve, key: str) -> list[float]:
    """Return the relative difference of a metric from one process at each step."""
    pairs = zip(curve.read_column(key), reference.read_column(key), strict=True)
    return [abs(actual - expected) / abs(expected) for actual, expected in pairs]


def plot(reference: Curve, curves: list[Curve], file: Path) -> None:
    """Plot the losses, and below them the relative differences from one process (`reference`)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (loss_axes, difference_axes) = plt.subplots(
        2, 1, figsize=(8, 7), sharex=True, height_ratios=(3, 2), layout="tight"
    )
    loss_axes.plot(
        reference.read_column("step"), reference.read_column("loss"), color="0.8", linewidth=8, label="one process"
    )
    for index, curve in enumerate(curves):
        style = {"color": f"C{index}", "label": f"{curve.name}, {curve.ranks} ranks"}
        steps, losses = curve.read_column("step"), curve.read_column("loss")
        # The dashes of the curves have different offsets, so that equal curves do not hide each other.
        loss_axes.plot(steps, losses, linestyle=(index * 3, (3, 3 * len(curves) - 3)), **style)
        differences = compute_relative_differences(curve, reference, "loss")
        difference_axes.semilogy(steps, [max(difference, 1e-9) for difference in differences], **style)
    loss_axes.set_ylabel("loss, nats per token")
    loss_axes.legend(handlelength=6)
    difference_axes.axhline(1e-4, color="black", linestyle=":", linewidth=1)
    difference_axes.annotate("what the tests allow", (1, 1e-4), xytext=(0, -12), textcoords="offset points", fontsize=9)
    difference_axes.set_ylim(1e-9, 1e-3)
    difference_axes.set_ylabel("relative difference\nfrom one process")
    difference_axes.set_xlabel("step")
    figure.savefig(file, dpi=120)


def make_page(reference: Curve, curves: list[Curve]) -> str:
    """Return the text of curves.md."""
    num_steps = len(reference.rows)
    rows = []
    for curve in (reference, *curves):
        losses, differences = curve.read_column("loss"), find_max_differences(curve, reference).values()
        cells = " | ".join("" if curve is reference else f"{difference:.1e}" for difference in differences)
        rows.append(f"| {curve.name} | {curve.ranks} | {losses[0]:.6f} | {losses[-1]:.6f} | {cells} |")
    lines = [
        "# Loss curves of layouts",
        "",
        "Compare the training curves of four layouts on eight ranks with one process. A curve that leaves the grey one",
        "would show a wrong gradient.",
        "",
        f"All runs train the decoder of `configs/layouts/one.yaml` for {num_steps} steps on Python's standard",
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
