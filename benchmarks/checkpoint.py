"""What a checkpoint costs a run: how long a save holds up the step, and how fast it is written.

On one process, in turn: steps alone, a save alone, and steps right after a save has begun, until it is on the disk.
`stall` is what `save` takes before the next step may begin, over a step; `slower` is a step while the thread writes,
over one alone; `bandwidth` is that of a save alone, copy, hashes and fsync included, over that of `dd conv=fsync` of
as many bytes into the same directory. The first save of all, which allocates the copies, is left out. `probe` is what
the loss and the logits of the probe take, at each save and at a start, over a step, and `probe_seconds` in seconds.

Prints one JSON line per save on stdout, then a table on stderr. The goal: a stall below 1.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.probe import PROBE
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.derive import resolve
from dist_llm.config.schema import CheckpointConfig, Config
from dist_llm.engines.measure_probe import measure_probe
from dist_llm.engines.native import NativeEngine
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.train.step import train_step

VOCAB = 8192


def main() -> None:
    """Run the saves and print them."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    top.add_argument("--saves", type=int, default=8, help="default: %(default)s, after one to warm up")
    top.add_argument("--d-model", type=int, default=512, help="default: %(default)s")
    top.add_argument("--layers", type=int, default=8, help="default: %(default)s")
    top.add_argument("--tokens", type=int, default=4096, help="of a step, in sequences of 256; default: %(default)s")
    top.add_argument("--directory", type=Path, help="where to write; default: the system's temporary directory")
    options = top.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        rows = run(options, Path(directory))
    for number, row in enumerate(rows, start=1):
        print(json.dumps({"save": number, **row}))
    sys.stdout.flush()
    table = Table("", "median", "least", "most", title=f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in rows[0]:
        values = [row[name] for row in rows]
        table.add_row(name, *(f"{each:.4g}" for each in (statistics.median(values), min(values), max(values))))
    Console(stderr=True).print(table)


def run(options: argparse.Namespace, directory: Path) -> list[dict[str, float]]:
    """One row per save."""
    sequences = max(1, options.tokens // 256)
    raw = {
        "run": {"dir": "unused", "steps": 1000},
        "model": {"d_model": options.d_model, "n_layers": options.layers, "n_heads": 8, "vocab_size": VOCAB},
        "data": {"path": "unused", "seq_len": 256, "global_batch": sequences},
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = resolve(Config.model_validate(raw), 1, 0)
    engine = NativeEngine(config, device)
    tokens = torch.randint(VOCAB, (sequences, 257))
    batch = Batch.of(tokens[:, :-1], tokens[:, 1:], CAUSAL)

    def step() -> float:
        begin = time.perf_counter()
        train_step(engine, [batch], 1e-4, 0).loss.item()
        return time.perf_counter() - begin

    store = CheckpointStore(directory / "checkpoints", CheckpointConfig(keep=1))
    step()
    shard = sum(tensor.nbytes for tensor in (engine.state.weights() | engine.state.moments()).values())
    rows = []
    for number in range(options.saves + 1):
        alone = statistics.median(step() for _ in range(3))
        begin = time.perf_counter()
        probe = measure_probe(engine, config)
        probe_seconds = time.perf_counter() - begin

        begin = time.perf_counter()
        store.save(engine.state, Progress(2 * number + 1), {PROBE: probe.dump()})
        store.finish()
        speed = shard / (time.perf_counter() - begin)

        begin = time.perf_counter()
        store.save(engine.state, Progress(2 * number + 2), {})
        stall, during = time.perf_counter() - begin, []
        while store.current_write is not None and store.current_write.is_alive():
            during.append(step())
        store.finish()
        row = {"step_seconds": alone, "megabytes": shard / 1e6, "stall": stall / alone}
        row |= {"slower": statistics.median(during) / alone if during else 1.0}
        row |= {"probe": probe_seconds / alone, "probe_seconds": probe_seconds}
        rows.append({**row, "megabytes_per_second": speed / 1e6, "bandwidth": speed / dd(directory / "dd", shard)})
    return rows[1:]


def dd(target: Path, size: int) -> float:
    """Bytes per second of a plain write of as many zeros."""
    begin = time.perf_counter()
    blocks = max(1, size // (1 << 20))
    command = ["dd", "if=/dev/zero", f"of={target}", "bs=1M", f"count={blocks}", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)
    return blocks * (1 << 20) / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
