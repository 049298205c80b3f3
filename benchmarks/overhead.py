"""Measure the overhead of the framework: tokens/s of `dist-llm train` on one process, relative to a bare loop.

ours   the training loop with its loader, schedule, metrics file, TensorBoard and progress lines
bare   the same model module in the loop of bare.py, with batches from a memory map as in nanoGPT; it reads the loss
       once per turn

Both run in this process and take turns of a few steps in the order ours, bare, bare, ours, so that a change in the
speed of the machine affects both alike. A pair is one turn of each. Neither evaluates, saves checkpoints or uses
torch.compile.

Prints one JSON line per pair on stdout, then a table on stderr. `tokens_per_second` belongs to ours,
`plain_tokens_per_second` to the bare loop. `ratio` is the first over the second: below 1 the framework is slower.
`cpu_ratio` compares CPU seconds of all threads instead of elapsed time. It is more reliable on a busy machine, with
OMP_NUM_THREADS=1 so that no thread spins while it waits.
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
CLAIM = 0.98  # the minimum ratio


def main() -> None:
    """Measure the pairs, and print the rows and the table."""
    options = make_parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        config = prepare_config_and_corpus(options, Path(scratch))
        turns = measure_turns(config, Path(scratch))
    for pair_number, pair in enumerate(turns.make_pairs(), start=1):
        print(json.dumps({"pair": pair_number, **pair}))
    sys.stdout.flush()
    print_report(config, turns)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--config", type=Path, default=Path("configs/demo.yaml"), help="config of the run; default: %(default)s"
    )
    parser.add_argument("--pairs", type=int, default=20, help="measured pairs, after a warm-up; default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="steps of each turn; default: %(default)s")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config keys: model.d_model=512 precision=bf16"
    )
    return parser


def prepare_config_and_corpus(options: argparse.Namespace, scratch: Path) -> Config:
    """Prepare a corpus of bytes in `scratch` and read the config; model.vocab_size is 4096 if the config has none."""
    prepare_log = (scratch / "prepare.txt").open("w")
    prepare(
        PrepareOptions(source=("python-stdlib",), tokenizer="byte", out=scratch / "corpus", heldout_fraction=0.0),
        prepare_log,
    )
    file_config, _ = load_config(options.config)
    vocab_size = file_config.model.vocab_size if file_config and file_config.model.vocab_size else 4096
    overrides = [
        f"model.vocab_size={vocab_size}",
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


def measure_turns(config: Config, scratch: Path) -> "Turns":
    """Train as `dist-llm train` does, with turns of the bare loop in between, and return the times of all turns."""
    world = World()
    device = select_device(world)
    plan = build_fresh_plan(config)
    engine = NativeEngine(config, device)
    vocabulary = read_vocabulary(config, plan.sources[0].corpus.directory)
    loader = build_loader(config, plan, vocabulary, *engine.dp_rank_and_size, pin=device.type == "cuda")
    start_logging(scratch / "run" / "logs", world)
    trainer = Trainer(config, world, engine, loader, CheckpointStore(scratch / "checkpoints"), start=None, files={})
    turns = Turns(BareLoop(config, device), config)
    trainer.recorder.sinks = [*trainer.recorder.sinks, turns]
    turns.start_clock()
    with StopSignals() as signals:
        trainer.run(signals)
    loader.close()
    stop_logging()
    return turns


class BareLoop:
    """The loop of bare.py around the model of dist_llm, with batches from a memory map."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        with torch.device("meta"):
            model = Decoder(config.model)
        model.to_empty(device=device)
        init_parameters(model, config)
        self.loop = Loop(model, config.optim, config.precision, device)
        self.random = np.random.default_rng(config.run.seed)
        self.loss = float("nan")

    def take_steps(self, num_steps: int) -> None:
        """Take steps; read the loss once, at the end."""
        for _ in range(num_steps):
            loss = self.loop.step(*self.load_batch())
        self.loss = loss.item()

    def load_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Read random windows from a new memory map; return inputs and targets."""
        data, seq_len = self.config.data, self.config.data.seq_len
        tokens = np.memmap(Path(data.path) / "train-00000.bin", dtype="<u2", mode="r")
        starts = self.random.integers(len(tokens) - seq_len, size=data.global_batch)
        inputs = torch.stack([torch.from_numpy(tokens[start : start + seq_len].astype(np.int64)) for start in starts])
        targets = torch.stack(
            [torch.from_numpy(tokens[start + 1 : start + 1 + seq_len].astype(np.int64)) for start in starts]
        )
        if self.device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)


class Turns:
    """A metrics sink of the training loop that runs the bare loop between two turns of the training loop.

    The training loop calls the sink at the end of each of its turns, every `log.every` steps.
    """

    def __init__(self, bare: BareLoop, config: Config) -> None:
        self.bare, self.steps_per_turn = bare, config.log.every
        self.tokens_per_turn = config.data.global_batch * config.data.seq_len * self.steps_per_turn
        self.our_times: list[tuple[float, float]] = []  # (elapsed seconds, CPU seconds)
        self.bare_times: list[tuple[float, float]] = []
        self.loss = float("nan")

    def start_clock(self) -> None:
        """Remember the wall time and the CPU time of the process."""
        self.start_times = time.perf_counter(), time.process_time()

    def read_clock(self) -> tuple[float, float]:
        """Return the seconds of wall time and of CPU time since `start_clock`."""
        return time.perf_counter() - self.start_times[0], time.process_time() - self.start_times[1]

    def __call__(self, rows: Sequence[MetricsRow]) -> None:
        self.our_times.append(self.read_clock())
        self.loss = rows[-1]["loss"]
        if len(self.our_times) % 2:
            for _ in range(2):
                self.start_clock()
                self.bare.take_steps(self.steps_per_turn)
                self.bare_times.append(self.read_clock())
        self.start_clock()

    def make_pairs(self) -> list[dict[str, float]]:
        """Return tokens/s of both and the ratios for each pair, without the warm-up."""
        pairs_after_warm_up = list(zip(self.our_times, self.bare_times, strict=False))[WARM_UP_PAIRS:]
        return [
            {
                "tokens_per_second": round(self.tokens_per_turn / our_seconds, 1),
                "plain_tokens_per_second": round(self.tokens_per_turn / bare_seconds, 1),
                "ratio": round(bare_seconds / our_seconds, 4),
                "cpu_ratio": round(bare_cpu_seconds / our_cpu_seconds, 4),
            }
            for (our_seconds, our_cpu_seconds), (bare_seconds, bare_cpu_seconds) in pairs_after_warm_up
        ]


def print_report(config: Config, turns: Turns) -> None:
    """Print the conditions of the measurement and the table."""
    model, data, pairs = config.model, config.data, turns.make_pairs()
    device_name = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    )
    lines = [
        f"d_model {model.d_model}, {model.n_layers} layers, vocabulary {model.vocab_size}, {data.global_batch} x "
        f"{data.seq_len} tokens, {config.precision}, torch {torch.__version__}, {device_name}",
        f"{len(pairs)} pairs of {turns.steps_per_turn} + {turns.steps_per_turn} steps; "
        f"last losses {turns.loss:.3f} (ours) and {turns.bare.loss:.3f} (bare)",
        "",
        f"{'':12}{'median':>12}{'min':>12}{'max':>12}",
    ]
    labels = {
        "tokens_per_second": "ours tok/s",
        "plain_tokens_per_second": "bare tok/s",
        "ratio": "ratio",
        "cpu_ratio": "cpu_ratio",
    }
    for name, label in labels.items():
        column = [pair[name] for pair in pairs]
        number_format = ".4f" if name.endswith("ratio") else ",.0f"
        cells = (format(value, number_format) for value in (statistics.median(column), min(column), max(column)))
        lines.append(f"{label:12}" + "".join(f"{cell:>12}" for cell in cells))
    lines.append(
        f"the claim, a ratio of at least {CLAIM}: median {statistics.median(pair['ratio'] for pair in pairs):.4f}"
    )
    print("\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    main()
