"""Measure what a batch costs: tokens/s of our loader, of nanoGPT's code, and of a plain copy of the same bytes.

ours      the loader as training uses it: it selects samples, finds, reads and checks them, and returns tensors of the
          corpus's type, which become int64 on the device
nanogpt   a memory map per batch and random starts; each window is sliced, widened and stacked, inputs and targets
          separately
copy      a copy of the same windows of the mapped file, row by row, and nothing else: the limit

All read one file of random uint16 ids from the page cache, on one thread, at random offsets. They take turns batch by
batch, so that a machine that slows down affects all alike. Prints one JSON line per case on stdout, then a table on
stderr: medians over the turns, and the median over the turns of the ratios.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

from dist_llm.config.derive import resolve
from dist_llm.config.schema import Config
from dist_llm.data.corpus import Corpus
from dist_llm.data.data_history import build_fresh_plan
from dist_llm.data.loader import Loader, build_loader
from dist_llm.data.shard import Manifest, Shard
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary

VOCABULARY = 50257
WARM_UP = 5
GOALS = {"nanogpt": 5.0, "copy": 0.5}  # the smallest ratio of ours to theirs

BatchMaker = Callable[[], object]


def main() -> None:
    """Measure and print each batch size."""
    options = make_parser().parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        corpus = write_corpus(Path(scratch), options.tokens)
        cases = [measure_case(corpus, options, rows, order) for rows in options.rows for order in ("shuffle", "random")]
    for row in cases:
        print(json.dumps(row))
    sys.stdout.flush()
    print_report(options, cases)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[8, 64, 512], help="sequences per batch; default: 8 64 512"
    )
    parser.add_argument("--seq-len", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="in the file; default: %(default)s")
    parser.add_argument("--turns", type=int, default=200, help="batches of each; default: %(default)s")
    parser.add_argument(
        "--scratch", type=Path, help="where the file is written; default: the system's temporary folder"
    )
    return parser


def write_corpus(directory: Path, tokens: int) -> Corpus:
    """Write a corpus of one shard of random ids."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, tokens, dtype="<u2")
    ids.tofile(directory / "train-00000.bin")
    shard = Shard("train-00000.bin", tokens, 1, 4 * tokens, "")
    Manifest("uint16", VOCABULARY, "", ("random",), {"train": (shard,), "heldout": ()}).save(directory)
    return Corpus(directory)


def measure_case(corpus: Corpus, options: argparse.Namespace, rows: int, order: str) -> dict[str, object]:
    """Measure tokens/s of the three, and the ratios of ours to the others."""
    path = corpus.directory / corpus.shards[0].file
    raw = {
        "run": {"dir": "unused", "steps": 1, "seed": 1},
        "model": {"d_model": 8, "n_layers": 1, "n_heads": 1},
        "data": {
            "path": str(corpus.directory),
            "seq_len": options.seq_len,
            "global_batch": rows,
            "order": order,
            "prefetch": 0,
        },
    }
    config = resolve(Config.model_validate(raw), 1, VOCABULARY)
    loader = build_loader(config, build_fresh_plan(config), ObjectiveVocabulary(VOCABULARY, 0), 0, 1, pin=False)
    makers = {
        "ours": make_loader_batches(loader, rows),
        "nanogpt": make_nanogpt_batches(path, rows, options.seq_len),
        "copy": copy_batches(path, rows, options.seq_len),
    }
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    orders = list(permutations(makers))  # the order decides what is in the processor's caches
    for turn in range(options.turns + WARM_UP):
        for name in orders[turn % len(orders)]:
            start_time = time.perf_counter()
            makers[name]()
            seconds[name].append(time.perf_counter() - start_time)
    seconds_after_warm_up = {name: times[WARM_UP:] for name, times in seconds.items()}
    tokens = rows * options.seq_len
    return {
        "rows": rows,
        "order": order,
        **{name: round(tokens / statistics.median(times)) for name, times in seconds_after_warm_up.items()},
        **{
            f"over_{name}": round(
                statistics.median(
                    b / a for a, b in zip(seconds_after_warm_up["ours"], seconds_after_warm_up[name], strict=True)
                ),
                3,
            )
            for name in GOALS
        },
    }


def make_loader_batches(loader: Loader, rows: int) -> BatchMaker:
    """Load the batch of one step after another, as in training but without the thread that works ahead."""
    steps = iter(range(0, 1 << 62, rows))
    return lambda: loader.load_batches(next(steps))


def make_nanogpt_batches(path: Path, rows: int, length: int) -> BatchMaker:
    """Make batches as nanoGPT does, with a new memory map for each."""

    def make() -> object:
        tokens = np.memmap(path, dtype="<u2", mode="r")
        starts = torch.randint(len(tokens) - length, (rows,))
        inputs = torch.stack([torch.from_numpy(tokens[i : i + length].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])
        return inputs, targets

    return make


def copy_batches(path: Path, rows: int, length: int) -> BatchMaker:
    """Copy bytes from the page cache to a new array."""
    tokens = np.asarray(np.memmap(path, dtype="<u2", mode="r"))
    random = np.random.default_rng(2)

    def make() -> object:
        batch = np.empty((rows, length + 1), "<u2")
        for row, start in zip(batch, random.integers(len(tokens) - length, size=rows).tolist(), strict=True):
            row[:] = tokens[start : start + length + 1]
        return batch

    return make


def print_report(options: argparse.Namespace, cases: list[dict[str, object]]) -> None:
    """Print the table and the goals."""
    print(
        f"{options.seq_len} tokens per row, {options.tokens:,} in the file, {options.turns} turns, 1 thread, "
        f"torch {torch.__version__}, numpy {np.__version__}; millions of tokens/s\n\n"
        f"{'rows':>6} {'order':>8} {'ours':>8} {'nanogpt':>8} {'copy':>8} {'over nanogpt':>13} {'over copy':>10}",
        file=sys.stderr,
    )
    for row in cases:
        rates = " ".join(f"{float(str(row[name])) / 1e6:8.1f}" for name in ("ours", "nanogpt", "copy"))
        ratios = f"{row['over_nanogpt']:13} {row['over_copy']:10}"
        print(f"{row['rows']:>6} {row['order']:>8} {rates} {ratios}", file=sys.stderr)
    goals = ", ".join(f"at least {goal} over {name}" for name, goal in GOALS.items())
    print(f"\nthe goal: {goals}", file=sys.stderr)


if __name__ == "__main__":
    main()
