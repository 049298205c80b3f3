"""Plot loss curves of a small decoder that show that post-norm needs learning-rate warmup and pre-norm does not.

Trains a deep, narrow decoder with pre-norm and post-norm, with and without warmup, and with post-norm initializations
that need no warmup (`model.init=depth` and `tfixup`). All runs read the same samples. On two cores the program takes
some minutes. It prints one JSON line per run, with the last held-out loss. With --docs DIR it also writes warmup.md and
warmup.png.

The question is that of Xiong et al. 2020 (On layer normalization in the transformer architecture), figure 2.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dist_llm.launch.world import World
from dist_llm.text.prepare import PrepareOptions, prepare
from dist_llm.training.run import train
from dist_llm.training.settings import read_config

REPOSITORY = Path(__file__).parents[1]
KEYS = (
    "run.steps=400",
    "model.d_model=64",
    "model.n_layers=6",
    "model.positions=learned",
    "model.norm=layernorm",
    "model.bias=true",
    "model.activation=gelu",
    "data.seq_len=64",
    "data.global_batch=16",
    "optim.lr=1e-3",
    "optim.beta2=0.98",
    "optim.clip=off",
    "schedule.name=constant",
    "eval.every=25",
    "eval.windows=64",
    "log.tensorboard=false",
)
WARMUP = "schedule.warmup_steps=200"
NO_WARMUP = "schedule.warmup_steps=0"


@dataclass(frozen=True)
class Run:
    """A training run: its name in the legend, its config keys in addition to KEYS, and the style of its curve."""

    name: str
    keys: tuple[str, ...]
    color: str
    dashed: bool = False


RUNS = (
    Run("pre-norm, warmup", ("model.norm_order=pre", WARMUP), "C0"),
    Run("pre-norm, none", ("model.norm_order=pre", NO_WARMUP), "C0", dashed=True),
    Run("post-norm, warmup", ("model.norm_order=post", "model.init=xavier", WARMUP), "C1"),
    Run("post-norm, none", ("model.norm_order=post", "model.init=xavier", NO_WARMUP), "C1", dashed=True),
    Run("post-norm, none, depth-scaled", ("model.norm_order=post", "model.init=depth", NO_WARMUP), "C2", dashed=True),
    Run(
        "post-norm, none, T-Fixup values", ("model.norm_order=post", "model.init=tfixup", NO_WARMUP), "C3", dashed=True
    ),
)


def main() -> None:
    """Train all runs, print their last losses, and write the page with --docs."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write warmup.md and warmup.png into it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys: run.steps=20")
    options = parser.parse_args()
    evaluations = []
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        prepare(
            PrepareOptions(source=("python-stdlib",), tokenizer="bpe:1024", out=corpus, heldout_fraction=0.05),
            sys.stderr,
        )
        for run in RUNS:
            evaluations.append(train_run(run, Path(scratch), corpus, options.overrides))
            print(json.dumps({"run": run.name, **evaluations[-1][-1]}), flush=True)
    if options.docs:
        plot(evaluations, options.docs / "warmup.png")
        (options.docs / "warmup.md").write_text(make_page(evaluations))


def train_run(run: Run, scratch: Path, corpus: Path, overrides: list[str]) -> list[dict[str, Any]]:
    """Train a run and return its evaluations: {step, heldout_loss}."""
    directory = scratch / run.name.replace(" ", "_")
    keys = [f"run.dir={directory}", f"data.path={corpus}", *KEYS, *run.keys, *overrides]
    train(read_config(REPOSITORY / "configs" / "debug.yaml", keys, world_size=1), World())
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in ("step", "heldout_loss")} for row in rows if "heldout_loss" in row]


def plot(evaluations: list[list[dict[str, Any]]], file: Path) -> None:
    """Plot held-out losses over steps; runs without warmup are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="tight")
    for run, rows in zip(RUNS, evaluations, strict=True):
        steps, losses = [row["step"] for row in rows], [row["heldout_loss"] for row in rows]
        axes.plot(steps, losses, "--" if run.dashed else "-", color=run.color, label=run.name)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss, nats per token")
    axes.legend()
    figure.savefig(file, dpi=120)


def make_page(evaluations: list[list[dict[str, Any]]]) -> str:
    """Return the text of warmup.md."""
    table = [
        f"| {run.name} | {rows[0]['heldout_loss']:.3f} | {rows[-1]['heldout_loss']:.3f} |"
        for run, rows in zip(RUNS, evaluations, strict=True)
    ]
    lines = [
        "# Warmup and the norm order",
        "",
        "This page helps to decide whether a model needs learning-rate warmup (`schedule.warmup_steps`). A post-norm",
        "model (`model.norm_order=post`) needs warmup, unless its initial values shrink with the depth. A pre-norm",
        "model does not need it.",
        "",
        "In a post-norm model, the gradients near the output are large at the start of training, however deep the",
        "model is (Xiong et al. 2020). With the full learning rate from the first step, the model then learns little",
        "more than the frequencies of the tokens. Warmup takes small steps until the gradients are smaller. A",
        "pre-norm model has no large gradients at the start. Initial values that shrink with the depth",
        "(`model.init=depth`, `model.init=tfixup`) are an alternative to warmup.",
        "",
        "![held-out losses](warmup.png)",
        "",
        f"| run | held-out loss after {evaluations[0][0]['step']} steps | after {evaluations[0][-1]['step']} steps |",
        "| --- | ---: | ---: |",
        *table,
        "",
        "The losses are in nats per token. All runs read the same samples of Python's standard library in the same",
        "order, with `configs/debug.yaml` and these keys:",
        "",
        "```text",
        *KEYS[:13],
        "```",
        "",
        f"The runs with warmup have `{WARMUP}`. The initial values are `model.init=gpt2` in pre-norm",
        "runs, `depth` and `tfixup` in the runs with depth-scaled and T-Fixup values, and `xavier` in the other two",
        "post-norm runs.",
        "",
        f"The runs computed in fp32 on a CPU, with torch {torch.__version__}. This command writes the page:",
        "",
        "```sh",
        "python benchmarks/warmup.py --docs docs",
        "```",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
