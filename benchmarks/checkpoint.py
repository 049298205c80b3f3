"""Measure how long a save delays the step, and how fast it is written.

One process takes steps alone, saves alone, and takes steps while a save is written. `stall` is the time that `save`
takes before the next step may begin, relative to a step. `slower` is a step during the write relative to one alone.
`bandwidth` is that of a save alone, with copy, hashes and fsync, relative to `dd conv=fsync` of as many bytes into the
same directory. The first save, which allocates the copies, is left out. `probe` is the time of the probe's loss and
logits, at each save and at a start, relative to a step, and `probe_seconds` the same in seconds. `lock_seconds` is the
time to take the lock of a run directory and to release it, once per start.

Prints one JSON line per save on stdout, then a table on stderr. The goal is a stall below 1.
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
from dist_llm.launch.run_lock import RunLock, this_process
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.training.step import train_step

VOCAB = 8192


def main() -> None:
    """Run and print the saves."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--saves", type=int, default=8, help="default: %(default)s, after one to warm up")
    parser.add_argument("--d-model", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, in sequences of 256; default: %(default)s")
    parser.add_argument("--directory", type=Path, help="where to write; default: the system's temporary directory")
    options = parser.parse_args()
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
    """Measure the saves, one row each."""
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
    batch = Batch.build(tokens[:, :-1], tokens[:, 1:], CAUSAL)

    def step() -> float:
        start_time = time.perf_counter()
        train_step(engine, [batch], 1e-4, 0).loss.item()
        return time.perf_counter() - start_time

    store = CheckpointStore(directory / "checkpoints", CheckpointConfig(keep=1))
    step()
    shard_bytes = sum(tensor.nbytes for tensor in (engine.state.weights() | engine.state.moments()).values())
    rows = []
    for number in range(options.saves + 1):
        step_seconds = statistics.median(step() for _ in range(3))
        start_time = time.perf_counter()
        probe = measure_probe(engine, config)
        probe_seconds = time.perf_counter() - start_time

        start_time = time.perf_counter()
        store.save(engine.state, Progress(2 * number + 1), {PROBE: probe.dump()})
        store.finish()
        bytes_per_second = shard_bytes / (time.perf_counter() - start_time)

        start_time = time.perf_counter()
        store.save(engine.state, Progress(2 * number + 2), {})
        stall, concurrent_steps = time.perf_counter() - start_time, []
        while store.current_write is not None and store.current_write.is_alive():
            concurrent_steps.append(step())
        store.finish()
        row = {"step_seconds": step_seconds, "megabytes": shard_bytes / 1e6, "stall": stall / step_seconds}
        row |= {"slower": statistics.median(concurrent_steps) / step_seconds if concurrent_steps else 1.0}
        start_time = time.perf_counter()
        with RunLock(directory / "run", this_process("localhost")):
            pass
        row |= {"probe": probe_seconds / step_seconds, "probe_seconds": probe_seconds}
        row |= {"lock_seconds": time.perf_counter() - start_time}
        rows.append(
            {
                **row,
                "megabytes_per_second": bytes_per_second / 1e6,
                "bandwidth": bytes_per_second / measure_dd(directory / "dd", shard_bytes),
            }
        )
    return rows[1:]


def measure_dd(target: Path, size: int) -> float:
    """Write as many zeros with dd; return bytes per second."""
    start_time = time.perf_counter()
    blocks = max(1, size // (1 << 20))
    command = ["dd", "if=/dev/zero", f"of={target}", "bs=1M", f"count={blocks}", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)
    return blocks * (1 << 20) / (time.perf_counter() - start_time)


if __name__ == "__main__":
    main()
