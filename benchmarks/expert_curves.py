"""Compare the held-out losses of configs/demo.yaml and configs/demo-moe.yaml, whose tokens use equally many weights.

Both train in one process on the same samples. The program prepares the corpus if it is missing. It prints one JSON
line per run on stdout, with its parameters, its held-out losses and the time of its training, and a table on stderr.

  python benchmarks/expert_curves.py
  python benchmarks/expert_curves.py run.steps=20 eval.every=10 model.n_layers=2
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dist_llm.launch.world import World
from dist_llm.models.build_model import count_parameters
from dist_llm.text.prepare import PrepareOptions, prepare
from dist_llm.training.run import train
from dist_llm.training.settings import read_config
from results import Results, format_table, make_parser, parse_options

CONFIGS = Path(__file__).parents[1] / "configs"
NAMES = ("demo", "demo-moe")
KEYS = ("eval.every=50", 'eval.sample_prompt=""', "log.tensorboard=false", "checkpoint.every=off")


def main() -> None:
    """Train both configs; print their losses."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    results = Results("expert_curves", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        if not options.data.exists():
            prepare(PrepareOptions(source=("python-stdlib",), tokenizer="bpe:4096", out=options.data), sys.stderr)
        for name in NAMES:
            keys = [f"run.dir={scratch}/{name}", f"data.path={options.data}", *KEYS, *options.overrides]
            results.add({"config": name, **train_config(name, keys, Path(scratch) / name)})
    results.finish(make_report(results), options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/stdlib"), help="the corpus; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch; default: %(default)s")
    return parse_options(parser)


def train_config(name: str, keys: list[str], directory: Path) -> dict[str, Any]:
    """Train a config, and return its parameters, its seconds of training and its held-out losses by step."""
    config = read_config(CONFIGS / f"{name}.yaml", keys, world_size=1)
    num_total, num_active = count_parameters(config.model)
    start_time = time.perf_counter()
    if stop_signal := train(config, World()):
        raise SystemExit(128 + stop_signal)
    seconds = time.perf_counter() - start_time
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    heldout_losses = {row["step"]: row["heldout_loss"] for row in rows if "heldout_loss" in row}
    return {"parameters": num_total, "active": num_active, "seconds": seconds, "heldout_losses": heldout_losses}


def make_report(results: Results) -> str:
    """Format the held-out losses as a table with a row per step."""
    losses_by_config = [row["heldout_losses"] for row in results.rows]
    rows = [(step, *(f"{losses[step]:.3f}" for losses in losses_by_config)) for step in losses_by_config[0]]
    rows += [
        (label, *(f"{row[name]:,.0f}" for row in results.rows))
        for name, label in (("parameters", "parameters"), ("active", "of a token"), ("seconds", "seconds"))
    ]
    return format_table(("step", *NAMES), rows)


if __name__ == "__main__":
    main()
