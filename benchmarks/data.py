"""Measure the time of loading a batch: tokens/s of our loader, of the loader of nanoGPT, and of a plain copy.

A window is seq_len + 1 consecutive tokens.

ours      the loader of training: it chooses samples, finds, reads and checks their windows, and returns tensors in the
          integer type of the corpus, which become int64 on the device
nanogpt   a new memory map per batch and random windows; each window is sliced, converted to int64 and stacked, for
          inputs and for targets
copy      a copy of as many windows from the mapped file, window by window: the limit

All three read one file of random uint16 ids from the page cache, on one thread, at random offsets. They take turns,
batch by batch, so that a change in the speed of the machine affects all alike. Prints one JSON line per case on stdout,
then a table on stderr. All figures are medians over the turns.
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

from dist_llm.config.derive import resolve_config
from dist_llm.config.schema import UnresolvedConfig
from dist_llm.data.corpus import Corpus
from dist_llm.data.data_history import build_fresh_plan
from dist_llm.data.loader import Loader, build_loader
from dist_llm.data.shard import CorpusManifest, Shard
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary

VOCAB_SIZE = 50257
WARM_UP_TURNS = 5
GOALS = {"nanogpt": 5.0, "copy": 0.5}  # minimum tokens/s of ours over theirs

LoadFunction = Callable[[], object]


def main() -> None:
    """Measure each batch size with each order, print the rows and the table."""
    options = make_parser().parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        corpus = write_corpus(Path(scratch), options.tokens)
        rows = [
            measure_case(corpus, options, batch_size, order)
            for batch_size in options.batch_sizes
            for order in ("shuffle", "random")
        ]
    for row in rows:
        print(json.dumps(row))
    sys.stdout.flush()
    print_report(options, rows)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument(
        "--rows",
        dest="batch_sizes",
        type=int,
        nargs="+",
        default=[8, 64, 512],
        help="sequences per batch; default: 8 64 512",
    )
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a sequence; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="tokens in the file; default: %(default)s")
    parser.add_argument("--turns", type=int, default=200, help="batches that each loads; default: %(default)s")
    parser.add_argument("--scratch", type=Path, help="folder for the file; default: the temporary folder of the system")
    return parser


def write_corpus(directory: Path, num_tokens: int) -> Corpus:
    """Write a corpus of one shard of random ids."""
    ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, num_tokens, dtype="<u2")
    ids.tofile(directory / "train-00000.bin")
    shard = Shard("train-00000.bin", num_tokens, documents=1, text_bytes=4 * num_tokens, sha256="")
    CorpusManifest("uint16", VOCAB_SIZE, "", ("random",), {"train": (shard,), "heldout": ()}).save(directory)
    return Corpus(directory)


def measure_case(corpus: Corpus, options: argparse.Namespace, batch_size: int, order: str) -> dict[str, object]:
    """Measure tokens/s of the three loaders, and the ratios of ours to the others; return the row."""
    path = corpus.directory / corpus.shards[0].file
    raw = {
        "run": {"dir": "unused", "steps": 1, "seed": 1},
        "model": {"d_model": 8, "n_layers": 1, "n_heads": 1},
        "data": {
            "path": str(corpus.directory),
            "seq_len": options.seq_len,
            "global_batch": batch_size,
            "order": order,
            "prefetch": 0,
        },
    }
    config = resolve_config(UnresolvedConfig.model_validate(raw), world_size=1, tokenizer_size=VOCAB_SIZE)
    loader = build_loader(
        config, build_fresh_plan(config), ObjectiveVocabulary(VOCAB_SIZE, eot=0), dp_rank=0, dp_size=1, pin=False
    )
    load_functions = {
        "ours": make_dist_llm_loader(loader, batch_size),
        "nanogpt": make_nanogpt_loader(path, batch_size, options.seq_len),
        "copy": make_copier(path, batch_size, options.seq_len),
    }
    seconds: dict[str, list[float]] = {name: [] for name in load_functions}
    orders = list(permutations(load_functions))  # the order affects what is in the caches of the processor
    for turn in range(options.turns + WARM_UP_TURNS):
        for name in orders[turn % len(orders)]:
            start_time = time.perf_counter()
            load_functions[name]()
            seconds[name].append(time.perf_counter() - start_time)
    seconds = {name: times[WARM_UP_TURNS:] for name, times in seconds.items()}
    tokens_per_batch = batch_size * options.seq_len
    rates = {name: round(tokens_per_batch / statistics.median(times)) for name, times in seconds.items()}
    ratios = {}
    for name in GOALS:
        pairs = zip(seconds["ours"], seconds[name], strict=True)
        ratios[f"over_{name}"] = round(
            statistics.median(other_seconds / our_seconds for our_seconds, other_seconds in pairs), 3
        )
    return {"rows": batch_size, "order": order, **rates, **ratios}


def make_dist_llm_loader(loader: Loader, batch_size: int) -> LoadFunction:
    """Return a function that loads the next batch as in training, but without the prefetch thread."""
    first_samples = iter(range(0, 1 << 62, batch_size))
    return lambda: loader.load_batches(next(first_samples))


def make_nanogpt_loader(path: Path, batch_size: int, seq_len: int) -> LoadFunction:
    """Return a function that loads a random batch as nanoGPT does, with a new memory map."""

    def load() -> object:
        tokens = np.memmap(path, dtype="<u2", mode="r")
        starts = torch.randint(len(tokens) - seq_len, (batch_size,))
        inputs = torch.stack([torch.from_numpy(tokens[i : i + seq_len].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(tokens[i + 1 : i + 1 + seq_len].astype(np.int64)) for i in starts])
        return inputs, targets

    return load


def make_copier(path: Path, batch_size: int, seq_len: int) -> LoadFunction:
    """Return a function that copies random windows from the page cache to a new array."""
    tokens = np.asarray(np.memmap(path, dtype="<u2", mode="r"))
    random = np.random.default_rng(2)

    def copy_windows() -> object:
        windows = np.empty((batch_size, seq_len + 1), "<u2")
        starts = random.integers(len(tokens) - seq_len, size=batch_size).tolist()
        for window, start in zip(windows, starts, strict=True):
            window[:] = tokens[start : start + seq_len + 1]
        return windows

    return copy_windows


def print_report(options: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    """Print the table and the goals."""
    print(
        f"{options.seq_len} tokens per sequence, {options.tokens:,} in the file, {options.turns} turns, 1 thread, "
        f"torch {torch.__version__}, numpy {np.__version__}; millions of tokens/s\n\n"
        f"{'rows':>6} {'order':>8} {'ours':>8} {'nanogpt':>8} {'copy':>8} {'over nanogpt':>13} {'over copy':>10}",
        file=sys.stderr,
    )
    for row in rows:
        rates = " ".join(f"{float(str(row[name])) / 1e6:8.1f}" for name in ("ours", "nanogpt", "copy"))
        ratios = f"{row['over_nanogpt']:13} {row['over_copy']:10}"
        print(f"{row['rows']:>6} {row['order']:>8} {rates} {ratios}", file=sys.stderr)
    goals = ", ".join(f"at least {goal} over {name}" for name, goal in GOALS.items())
    print(f"\nthe goal: {goals}", file=sys.stderr)


if __name__ == "__main__":
    main()
