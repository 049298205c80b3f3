"""Compare the engines on the same work with two ranks on one machine: tokens/s, peak memory and bytes sent.

Each case starts two processes of one thread, which train the same model for the same steps. The engines take turns,
round by round, so that a change in the speed of the machine affects all engines alike. `ratio` is tokens/s relative to
the native engine in the same round. `peak_bytes` is the growth of the resident memory of a rank after all imports.
`wire_bytes` are the bytes that the loopback device sends per rank and step, with the traffic of other programs.

Prints one JSON line per case and round on stdout, and a table on stderr. `--write` writes the table to docs/engines.md.
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
from dist_llm.config.derive import resolve_config
from dist_llm.config.schema import Config, UnresolvedConfig
from dist_llm.engines.build_engine import build_engine
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.training.step import train_step
from measure import PeakMemory

DOCUMENT_FILE = Path(__file__).parents[1] / "docs" / "engines.md"
TABLE_BEGIN, TABLE_END = "<!-- table: benchmarks/engines.py -->\n", "<!-- /table -->\n"
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
    """Measure all cases in turns, print the rows, and write the table with --write."""
    options = make_parser().parse_args()
    rows: list[dict[str, Any]] = []
    baseline_rate = float("nan")
    for round_index in range(options.rounds):
        for name in CASES:
            row: dict[str, Any] = {"round": round_index, "case": name, **measure_case(name, options)}
            if name == BASELINE:  # the first case of each round
                baseline_rate = row["tokens_per_second"]
            row["ratio"] = row["tokens_per_second"] / baseline_rate
            rows.append(row)
            print(json.dumps(row), flush=True)
    table = make_table(rows, options)
    print(table, file=sys.stderr)
    if options.write:
        before, _, table_and_after = DOCUMENT_FILE.read_text().partition(TABLE_BEGIN)
        _, _, after = table_and_after.partition(TABLE_END)
        DOCUMENT_FILE.write_text(before + TABLE_BEGIN + table + TABLE_END + after)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for name, default, text in (
        ("rounds", 3, "turns of each engine"),
        ("steps", 8, "timed steps of a turn, after two to warm up"),
        ("d-model", 384, "width of the model"),
        ("layers", 6, "blocks of the model"),
        ("vocabulary", 8192, "number of token ids"),
        ("seq-len", 256, "tokens of a sequence"),
        ("batch", 8, "sequences of a step, over both ranks"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text}; default: %(default)s")
    parser.add_argument("--write", action="store_true", help=f"write the table into docs/{DOCUMENT_FILE.name}")
    return parser


def make_case_config(name: str, options: argparse.Namespace) -> Config:
    """Make the resolved config of a case."""
    model = {"d_model": options.d_model, "n_layers": options.layers, "n_heads": 6, "vocab_size": options.vocabulary}
    data = {"path": "unused", "seq_len": options.seq_len, "global_batch": options.batch}
    config = UnresolvedConfig.model_validate(
        {"run": {"dir": "unused", "steps": 1}, "model": model, "data": data, **CASES[name]}
    )
    assert not (violations := check(config, RANKS, tokenizer_size=0)), violations
    return resolve_config(config, RANKS, tokenizer_size=0)


def measure_case(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Start the ranks of a case and measure one turn."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_run_rank, (make_case_config(name, options), options.steps, scratch), nprocs=RANKS)
        results = [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return {
        "tokens_per_second": options.batch * options.seq_len * options.steps / results[0]["seconds"],
        "peak_bytes": max(result["peak_bytes"] for result in results),
        "wire_bytes": results[0]["wire_bytes"] / RANKS / options.steps,
        "loss": results[0]["loss"],
    }


def _run_rank(rank: int, config: Config, steps: int, scratch: str) -> None:
    """Train on one rank and write its measurements to the folder `scratch`."""
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
    start_time, sent_bytes_before = time.perf_counter(), _read_sent_bytes()
    for step in range(2, 2 + steps):
        report = train_step(engine, batches, config.optim.lr, step)
    loss = report.loss.item()
    dist.barrier()
    result = {
        "seconds": time.perf_counter() - start_time,
        "wire_bytes": _read_sent_bytes() - sent_bytes_before,
        "peak_bytes": peak.read_bytes(),
        "loss": loss,
    }
    (Path(scratch) / f"{rank}.json").write_text(json.dumps(result))
    dist.barrier()
    del engine, report
    gc.collect()  # models must be deleted before the process group
    dist.destroy_process_group()


def _read_sent_bytes() -> int:
    """Return the bytes that the loopback device has sent since the machine started."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def make_table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Format the medians over the rounds as a Markdown table with a heading."""
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
