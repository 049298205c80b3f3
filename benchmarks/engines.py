"""The engines on the same work: tokens/s, peak memory and bytes on the wire, two ranks on one machine.

Each case is two processes of one thread that train one model in the same steps; engines take turns, round by round,
so that a machine that slows down touches all alike. Tokens/s are over the native engine's of the same round. Memory
is the highest resident size of a rank above what it had with everything imported. Bytes are what the loopback device
carried meanwhile, by rank and step: other programs' traffic on this machine would be counted too.

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
from dist_llm.train.step import train_step
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
    """Measure, print, and write the table if asked to."""
    options = parser().parse_args()
    rows: list[dict[str, Any]] = []
    for number in range(options.rounds):
        for name in CASES:
            found: dict[str, Any] = {"round": number, "case": name, **measured(name, options)}
            base = next(row for row in reversed([*rows, found]) if row["case"] == BASELINE)
            found["ratio"] = found["tokens_per_second"] / base["tokens_per_second"]
            rows.append(found)
            print(json.dumps(found), flush=True)
    text = table(rows, options)
    print(text, file=sys.stderr)
    if options.write:
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        DOCUMENT.write_text(before + BEGIN + text + END + rest.partition(END)[2])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    for name, default, text in (
        ("rounds", 3, "how often each engine has its turn"),
        ("steps", 8, "timed steps of each turn, after two others"),
        ("d-model", 384, "width"),
        ("layers", 6, "blocks"),
        ("vocabulary", 8192, "token ids"),
        ("seq-len", 256, "tokens of a sequence"),
        ("batch", 8, "sequences of a step, over both ranks"),
    ):
        top.add_argument(f"--{name}", type=int, default=default, help=f"{text}; default: %(default)s")
    top.add_argument("--write", action="store_true", help=f"write the table into docs/{DOCUMENT.name}")
    return top


def config_of(name: str, options: argparse.Namespace) -> Config:
    """A case as a resolved config."""
    model = {"d_model": options.d_model, "n_layers": options.layers, "n_heads": 6, "vocab_size": options.vocabulary}
    data = {"path": "unused", "seq_len": options.seq_len, "global_batch": options.batch}
    config = Config.model_validate({"run": {"dir": "unused", "steps": 1}, "model": model, "data": data, **CASES[name]})
    assert not (broken := check(config, RANKS, 0)), broken
    return resolve(config, RANKS, 0)


def measured(name: str, options: argparse.Namespace) -> dict[str, float]:
    """One turn of a case, in processes started for it."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_rank, (config_of(name, options), options.steps, scratch), nprocs=RANKS)
        found = [json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(RANKS)]
    return {
        "tokens_per_second": options.batch * options.seq_len * options.steps / found[0]["seconds"],
        "peak_bytes": max(each["peak_bytes"] for each in found),
        "wire_bytes": found[0]["wire_bytes"] / RANKS / options.steps,
        "loss": found[0]["loss"],
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
    batches = [Batch.of(tokens[:, :-1], tokens[:, 1:], CAUSAL)]
    for step in range(2):
        train_step(engine, batches, config.optim.lr, step)
    dist.barrier()
    begin, sent = time.perf_counter(), _carried()
    for step in range(2, 2 + steps):
        report = train_step(engine, batches, config.optim.lr, step)
    loss = report.loss.item()
    dist.barrier()
    found = {
        "seconds": time.perf_counter() - begin,
        "wire_bytes": _carried() - sent,
        "peak_bytes": peak.bytes(),
        "loss": loss,
    }
    (Path(scratch) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    del engine, report
    gc.collect()  # models must be gone before the group is
    dist.destroy_process_group()


def _carried() -> int:
    """Bytes that the loopback device has sent since the machine started."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def table(rows: list[dict[str, Any]], options: argparse.Namespace) -> str:
    """Medians over the rounds, as Markdown."""
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
        mine = [row for row in rows if row["case"] == name]
        rate, ratio, peak, wire, loss = (
            statistics.median(row[key] for row in mine)
            for key in ("tokens_per_second", "ratio", "peak_bytes", "wire_bytes", "loss")
        )
        lines.append(f"| {name} | {rate:,.0f} | {ratio:.2f} | {peak / 1e6:.0f} | {wire / 1e6:.1f} | {loss:.5f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
