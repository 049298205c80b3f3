"""Measure how long a checkpoint save delays the next training step, and how fast the checkpoint is written.

One process takes steps without a write, saves without steps, and takes steps while a save is written. Each round has:
  stall          time that `save` takes before the next step can begin, over the time of a step
  slower         time of a step during the write, over the time of a step without a write
  bandwidth      bytes/s of a save without steps (copy, hashes and fsync), over those of `dd conv=fsync` in this folder
  probe          time of the probe (a loss and logits on fixed tokens) over the time of a step; once per save and start
  lock_seconds   seconds to take and release the lock of a run directory, once per start
The first round, which allocates the staging buffers, is left out.

Prints one JSON line per round on stdout, then a table on stderr. The goal is a stall below 1.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dist_llm.checkpoint.checkpoint_state import Progress
from dist_llm.checkpoint.probe import PROBE_FILE
from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.derive import resolve_config
from dist_llm.config.schema import CheckpointConfig, Config, UnresolvedConfig
from dist_llm.engines.measure_probe import measure_probe
from dist_llm.engines.native import NativeEngine
from dist_llm.launch.run_lock import RunLock, describe_this_process
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.training.step import train_step
from measure import measure_seconds

VOCAB_SIZE = 8192
SEQ_LEN = 256


def main() -> None:
    """Measure the saves, and print the rows and the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--saves", type=int, default=8, help="rounds, after one to warm up; default: %(default)s")
    parser.add_argument("--d-model", type=int, default=512, help="width of the model; default: %(default)s")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model; default: %(default)s")
    parser.add_argument(
        "--tokens", type=int, default=4096, help=f"tokens of a step, in sequences of {SEQ_LEN}; default: %(default)s"
    )
    parser.add_argument("--directory", type=Path, help="where to write; default: the temporary directory of the system")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        rows = measure_saves(options, Path(directory))
    for save_number, row in enumerate(rows, start=1):
        print(json.dumps({"save": save_number, **row}))
    sys.stdout.flush()
    table = Table("", "median", "least", "most", title=f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name in rows[0]:
        values = [row[name] for row in rows]
        table.add_row(name, *(f"{value:.4g}" for value in (statistics.median(values), min(values), max(values))))
    Console(stderr=True).print(table)


def measure_saves(options: argparse.Namespace, directory: Path) -> list[dict[str, float]]:
    """Measure all rounds and return one row per round, without the first."""
    num_sequences = max(1, options.tokens // SEQ_LEN)
    raw = {
        "run": {"dir": "unused", "steps": 1000},
        "model": {"d_model": options.d_model, "n_layers": options.layers, "n_heads": 8, "vocab_size": VOCAB_SIZE},
        "data": {"path": "unused", "seq_len": SEQ_LEN, "global_batch": num_sequences},
    }
    config = resolve_config(UnresolvedConfig.model_validate(raw), world_size=1, tokenizer_size=0)
    rounds = Rounds(config, directory)
    return [rounds.measure() for _ in range(options.saves + 1)][1:]


class Rounds:
    """Take steps of a model on one batch of random tokens, and measure the saves between and during the steps."""

    def __init__(self, config: Config, directory: Path) -> None:
        self.config, self.directory = config, directory
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.engine = NativeEngine(config, self.device)
        tokens = torch.randint(VOCAB_SIZE, (config.data.global_batch, SEQ_LEN + 1))
        self.batch = Batch.build(tokens[:, :-1], tokens[:, 1:], CAUSAL)
        self.store = CheckpointStore(directory / "checkpoints", CheckpointConfig(keep=1))
        self.num_saves = 0
        self.take_step()  # creates the optimizer state
        tensors = self.engine.state.weights() | self.engine.state.moments()
        self.state_bytes = sum(tensor.nbytes for tensor in tensors.values())

    def take_step(self) -> None:
        """Take a step and wait for its loss."""
        train_step(self.engine, [self.batch], lr=1e-4, step=0).loss.item()

    def start_save(self, files: Mapping[str, bytes]) -> None:
        """Start to save a checkpoint with these files; return when the next step may begin."""
        self.num_saves += 1
        self.store.save(self.engine.state, Progress(self.num_saves), files)

    def measure(self) -> dict[str, float]:
        """Measure a round: steps without a write, a save without steps, and steps during a write."""
        step_seconds = statistics.median(measure_seconds(self.take_step, self.device) for _ in range(3))
        start_time = time.perf_counter()
        probe = measure_probe(self.engine, self.config)
        probe_seconds = time.perf_counter() - start_time

        start_time = time.perf_counter()
        self.start_save({PROBE_FILE: probe.dump()})
        self.store.finish()
        bytes_per_second = self.state_bytes / (time.perf_counter() - start_time)

        stall_seconds, concurrent_step_seconds = measure_seconds(lambda: self.start_save({}), self.device), []
        while self.store.current_write is not None and self.store.current_write.is_alive():
            concurrent_step_seconds.append(measure_seconds(self.take_step, self.device))
        self.store.finish()
        slowdown = statistics.median(concurrent_step_seconds) / step_seconds if concurrent_step_seconds else 1.0
        return {
            "step_seconds": step_seconds,
            "megabytes": self.state_bytes / 1e6,
            "stall": stall_seconds / step_seconds,
            "slower": slowdown,
            "probe": probe_seconds / step_seconds,
            "probe_seconds": probe_seconds,
            "lock_seconds": measure_seconds(self.take_and_release_lock, self.device),
            "megabytes_per_second": bytes_per_second / 1e6,
            "bandwidth": bytes_per_second / measure_dd(self.directory / "dd", self.state_bytes),
        }

    def take_and_release_lock(self) -> None:
        """Lock a run directory and release the lock."""
        with RunLock(self.directory / "run", describe_this_process("localhost")):
            pass


def measure_dd(target: Path, num_bytes: int) -> float:
    """Write `num_bytes` zeros with dd, in blocks of 1 MiB; return bytes per second."""
    start_time = time.perf_counter()
    num_blocks = max(1, num_bytes // (1 << 20))
    command = ["dd", "if=/dev/zero", f"of={target}", "bs=1M", f"count={num_blocks}", "conv=fsync"]
    subprocess.run(command, check=True, capture_output=True)
    return num_blocks * (1 << 20) / (time.perf_counter() - start_time)


if __name__ == "__main__":
    main()
