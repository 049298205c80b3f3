"""Measure the overhead of the framework: tokens/s of `dist-llm train` on one process, relative to a bare loop.

The bare loop has the same model module, a batch from a memory map as nanoGPT makes it, F.cross_entropy, backward,
clip_grad_norm_ and fused AdamW, and reads the loss every few steps. Ours is the real training loop with its loader,
schedule, metrics file, TensorBoard and progress lines. Both run in this process and take turns of a few steps in the
order ours, bare, bare, ours, so that a change in the machine's speed affects both alike. Neither evaluates, saves
checkpoints or uses torch.compile.

Prints one JSON line per pair on stdout, then a table on stderr. A ratio of 1 is no cost; below 1 the framework is
slower. `cpu_ratio` compares CPU seconds of all threads in place of elapsed time: it is more reliable on a machine that
others use, with OMP_NUM_THREADS=1 so that no thread spins while it waits.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from bare import Loop
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.derive import resolve_schedule
from dist_llm.config.load import load_config
from dist_llm.config.schema import Config
from dist_llm.data.data_history import build_fresh_plan
from dist_llm.data.loader import build_loader
from dist_llm.engines.native import NativeEngine
from dist_llm.launch.process_group import select_device
from dist_llm.launch.stop import StopSignals
from dist_llm.launch.world import World
from dist_llm.models.decoder import Decoder
from dist_llm.observe.console import start_logging, stop_logging
from dist_llm.observe.metrics import MetricsRow
from dist_llm.parallel.parallelize import init_parameters
from dist_llm.text.prepare import PrepareOptions, prepare
from dist_llm.training.settings import read_config, read_vocabulary
from dist_llm.training.trainer import Trainer

WARM_UP_PAIRS = 2
CLAIM = 0.98  # the smallest ratio that we promise


def main() -> None:
    """Run and print the pairs."""
    options = make_parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        config = read_config_and_corpus(options, Path(scratch))
        turns = run(config, options.pairs, Path(scratch))
    for number, pair in enumerate(turns.pairs(), start=1):
        print(json.dumps({"pair": number, **pair}))
    sys.stdout.flush()
    print_report(config, turns)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"), help="default: %(default)s")
    parser.add_argument("--pairs", type=int, default=20, help="pairs measured, after a warm-up; default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="steps of each turn; default: %(default)s")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as for train: model.d_model=512 precision=bf16"
    )
    return parser


def read_config_and_corpus(options: argparse.Namespace, scratch: Path) -> Config:
    """Read the config and make a corpus of bytes; the vocabulary has the config's size, or 4096."""
    quiet = (scratch / "prepare.txt").open("w")
    prepare(PrepareOptions(("python-stdlib",), "byte", scratch / "corpus", heldout_fraction=0.0), quiet)
    plain, _ = load_config(options.config)
    overrides = [
        f"model.vocab_size={plain.model.vocab_size if plain and plain.model.vocab_size else 4096}",
        *options.overrides,
        f"data.path={scratch / 'corpus'}",
        f"run.dir={scratch / 'run'}",
        f"run.steps={(options.pairs + WARM_UP_PAIRS) * options.steps}",
        f"log.every={options.steps}",
        "checkpoint.every=off",
        "data.micro_batch=null",
        "compile=false",
    ]
    config = read_config(options.config, overrides, world_size=1)
    return config.model_copy(update={"schedule": resolve_schedule(config)})


def run(config: Config, pairs: int, scratch: Path) -> "Turns":
    """Train as `dist-llm train` does, with turns of the bare loop in between."""
    world = World()
    device = select_device(world)
    plan = build_fresh_plan(config)
    engine = NativeEngine(config, device)
    vocabulary = read_vocabulary(config, plan.sources[0].corpus.directory)
    loader = build_loader(config, plan, vocabulary, *engine.dp_rank_and_size, pin=device.type == "cuda")
    start_logging(scratch / "run" / "logs", world)
    trainer = Trainer(config, world, engine, loader, CheckpointStore(scratch / "checkpoints"), None, {})
    turns = Turns(BareLoop(config, device), config)
    trainer.recorder.sinks = [*trainer.recorder.sinks, turns]
    turns.start()
    with StopSignals() as signals:
        trainer.run(signals)
    loader.close()
    stop_logging()
    return turns


class BareLoop:
    """The bare loop around the model, with its batches."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        with torch.device("meta"):
            model = Decoder(config.model)
        model.to_empty(device=device)
        init_parameters(model, config)
        self.loop = Loop(model, config.optim, config.precision, device)
        self.random = np.random.default_rng(config.run.seed)
        self.loss = float("nan")

    def steps(self, count: int) -> None:
        """Take steps; read the loss once, at the end."""
        for _ in range(count):
            loss = self.loop.step(*self.batch())
        self.loss = loss.item()

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read random windows from a memory map."""
        data, length = self.config.data, self.config.data.seq_len
        tokens = np.memmap(Path(data.path) / "train-00000.bin", dtype="<u2", mode="r")
        starts = self.random.integers(len(tokens) - length, size=data.global_batch)
        inputs = torch.stack([torch.from_numpy(tokens[i : i + length].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])
        if self.device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)


class Turns:
    """A sink of the training loop that lets the bare loop take a turn after each turn of the training loop."""

    def __init__(self, bare: BareLoop, config: Config) -> None:
        self.bare, self.steps = bare, config.log.every
        self.tokens = config.data.global_batch * config.data.seq_len * self.steps
        self.our_times: list[tuple[float, float]] = []  # seconds, CPU seconds
        self.bare_times: list[tuple[float, float]] = []
        self.loss = float("nan")

    def start(self) -> None:
        self.start_times = time.perf_counter(), time.process_time()

    def elapsed(self) -> tuple[float, float]:
        return time.perf_counter() - self.start_times[0], time.process_time() - self.start_times[1]

    def __call__(self, rows: Sequence[MetricsRow]) -> None:
        self.our_times.append(self.elapsed())
        self.loss = rows[-1]["loss"]
        if len(self.our_times) % 2:
            for _ in range(2):
                self.start()
                self.bare.steps(self.steps)
                self.bare_times.append(self.elapsed())
        self.start()

    def pairs(self) -> list[dict[str, float]]:
        """Return tokens/s of both and the ratios, without the warm-up."""
        pairs_after_warm_up = list(zip(self.our_times, self.bare_times, strict=False))[WARM_UP_PAIRS:]
        return [
            {
                "ours": round(self.tokens / our_seconds, 1),
                "bare": round(self.tokens / bare_seconds, 1),
                "ratio": round(bare_seconds / our_seconds, 4),
                "cpu_ratio": round(bare_cpu / our_cpu, 4),
            }
            for (our_seconds, our_cpu), (bare_seconds, bare_cpu) in pairs_after_warm_up
        ]


def print_report(config: Config, turns: Turns) -> None:
    """Print the table and what was measured."""
    model, data, pairs = config.model, config.data, turns.pairs()
    device_name = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    )
    lines = [
        f"d_model {model.d_model}, {model.n_layers} layers, vocabulary {model.vocab_size}, {data.global_batch} x "
        f"{data.seq_len} tokens, {config.precision}, torch {torch.__version__}, {device_name}",
        f"{len(pairs)} pairs of {turns.steps} + {turns.steps} steps; "
        f"last losses {turns.loss:.3f} (ours) and {turns.bare.loss:.3f} (bare)",
        "",
        f"{'':12}{'median':>12}{'min':>12}{'max':>12}",
    ]
    for name, unit in (("ours", " tok/s"), ("bare", " tok/s"), ("ratio", ""), ("cpu_ratio", "")):
        column = [pair[name] for pair in pairs]
        form = ",.0f" if unit else ".4f"
        cells = (format(value, form) for value in (statistics.median(column), min(column), max(column)))
        lines.append(f"{name + unit:12}" + "".join(f"{value:>12}" for value in cells))
    lines.append(f"the claim, a ratio of at least {CLAIM}: median {statistics.median(p['ratio'] for p in pairs):.4f}")
    print("\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    main()
