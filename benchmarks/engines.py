"""Compare engines on the same work: tokens/s, peak memory and bytes sent, with two ranks on one machine.

Each case is two processes of one thread that train one model for the same steps. Engines take turns, round by round, so
that a machine that slows down affects all alike. Tokens/s are also given relative to the native engine in the same
round. Memory is the highest resident size of a rank above its size after all imports. Bytes are those that the loopback
device sends meanwhile, by rank and step, which includes traffic of other programs on this machine.

Prints one JSON line per case and round on stdout, and a table on stderr. `--write` puts it into docs/engines.md.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_llm.config.check import check
from dist_llm.config.derive import resolve
from dist_llm.config.schema import Config
from dist_llm.engines.build_engine import build_engine
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.training.step import train_step
from measure import PeakMemory

DOCUMENT = Path(__file__).parents[1] / "docs" / "engines.md"
BEGIN, END = "<!-- table: benchmarks/engines.py -->\n", "<!-- /table -->\n"
RANKS = 2
BASELINE = "native, dp_shard 2"
CASES: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "native, dp_replicate 2": {"parallel": {"dp_replicate": 2}},
    **{f"deepspeed, stage {stage}": {"engine": "deepspeed", "deepspeed": {"stage": stage}} for stage in range(4)},
    "accelerate, ddp": {"engine": "accelerate"},
    "accelerate, deepspeed stage 2": {
        "engine": "accelerate",
        "accelerate": {"plugin": "deepspeed"},
        "deepspeed": {"stage": 2},
    },
}


def main() -> None:
    """Measure, print, and write the table with --write."""
    options = make_parser().parse_args()
    rows: list[dict[str, Any]] = []
    for number in range(options.rounds):
        for name in CASES:
            row: dict[str, Any] = {"round": number, "case": name, **measure_case(name, options)}
            base = next(each for each in reversed([*rows, row]) if each["case"] == BASELINE)
            row["ratio"] = row["tokens_per_second"] / base["tokens_per_second"]
            rows.append(row)
            print(json.dumps(row), flush=True)
    text = make_table(rows, options)
    print(text, file=sys.stderr)
    if options.write:
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        DOCUMENT.write_text(before + BEGIN + text + END + rest.partition(END)[2])


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for name, default, text in (
        ("rounds", 3, "how often each engine has its turn"),
        ("steps", 8, "timed steps of each turn, after two others"),
        ("d-model", 384, "width"),
        ("layers", 6, "blocks"),
        ("vocabulary", 8192, "token ids"),
        ("seq-len", 256, "tokens of a sequence"),
        ("batch", 8, "sequences of a step, over both ranks"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; default: %(default)s")
    parser.add_argument("--write", action="store_true", help=f"write the table into docs/{DOCUMENT.name}")
    return parser


def make_config(name: str, options: argparse.Namespace) -> Config:
    """Make the resolved config of a case."""
    model = {"d_model": options.d_model, "n_layers": options.layers, "n_heads": 6, "vocab_size": options.vocabulary}
    data = {"path": "unused", "seq_len": options.seq_len, "global_batch": options.batch}
    config = Config.model_validate({"run": {"dir": "unused", "steps": 1}, "model": model, "data": data, **CASES[name]})
    assert not (broken := check(config, RANKS, 0)), broken
    return resolve(config, RANKS, 0)


def measure_case(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure one turn of a case, in processes started for it."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_rank, (make_config(name, options), options.steps, scratch), nprocs=RANKS)
        results = [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return {
        "tokens_per_second": options.batch * options.seq_len * options.steps / results[0]["seconds"],
        "peak_bytes": max(each["peak_bytes"] for each in results),
        "wire_bytes": results[0]["wire_bytes"] / RANKS / options.steps,
        "loss": results[0]["loss"],
    }


def _rank(rank: int, config: Config, steps: int, scratch: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{scratch}/store", RANKS), rank=rank, world_size=RANKS)
    if config.engine == "accelerate":
        import accelerate  # noqa: F401
    if config.uses_deepspeed:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed  # noqa: F401
    peak = PeakMemory(torch.device("cpu"))
    engine = build_engine(config, torch.device("cpu"))
    generator = torch.Generator().manual_seed(rank)
    shape = (config.data.micro_batch, config.data.seq_len + 1)
    tokens = torch.randint(config.model.vocab_size, shape, generator=generator)
    batches = [Batch.build(tokens[:, :-1], tokens[:, 1:], CAUSAL)]
    for step in range(2):
        train_step(engine, batches, config.optim.lr, step)
    dist.barrier()
    start_time, sent = time.perf_counter(), _read_sent_bytes()
    for step in range(2, 2 + steps):
        report = train_step(engine, batches, config.optim.lr, step)
    loss = report.loss.item()
    dist.barrier()
    result = {
        "seconds": time.perf_counter() - start_time,
        "wire_bytes": _read_sent_bytes() - sent,
        "peak_bytes": peak.bytes(),
        "loss": loss,
    }
    (Path(scratch) / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    del engine, report
    gc.collect()  # models must be deleted before the group
    dist.destroy_process_group()


def _read_sent_bytes() -> int:
    """Return the bytes that the loopback device has sent since the machine started."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def make_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Format medians over the rounds as Markdown."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "accelerate"))
    lines = [
        f"{options.layers} blocks of width {options.d_model}, vocabulary {options.vocabulary}, fp32, AdamW; "
        f"{options.batch} sequences of {options.seq_len} tokens a step;",
        f"{RANKS} ranks of one thread, gloo, {platform.machine()}; {versions}; medians of {options.rounds} rounds.",
        "",
        "| engine | tokens/s | over native | peak memory of a rank, MB | sent by a rank in a step, MB | loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in CASES:
        case_rows = [row for row in rows if row["case"] == name]
        rate, ratio, peak, wire, loss = (
            statistics.median(row[key] for row in case_rows)
            for key in ("tokens_per_second", "ratio", "peak_bytes", "wire_bytes", "loss")
        )
        lines.append(f"| {name} | {rate:,.0f} | {ratio:.2f} | {peak / 1e6:.0f} | {wire / 1e6:.1f} | {loss:.5f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
