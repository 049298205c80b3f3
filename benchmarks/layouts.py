"""Measure what a layout costs: two gloo ranks of one thread each, compared with two independent processes.

  ideal         each process trains on its half of the batch alone: no layout can be faster
  dp_replicate, dp_shard, tp, cp, pp
                the axis of `parallel` with both ranks; microbatches of pp are single sequences
  tp, whole     tensor parallel without sequence_parallel
  muon          dp_shard with optim.name: muon; `ideal muon` is its limit

All take turns one after another. `ratio` is tokens/s relative to the ideal, the median over the rounds. On a machine of
two cores gloo's threads and their copies compete with the ranks.

  python benchmarks/layouts.py
  python benchmarks/layouts.py --models llama-cpu --layouts dp_shard tp
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from dist_llm.engines.native import NativeEngine
from dist_llm.launch.group import keep_freed_memory
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.training.step import train_step
from measure import DTYPES, take_turns
from models import MODELS, make_config
from results import Results, format_table, make_parser, parse_options

RANKS = 2
LAYOUTS: dict[str, tuple[str, ...]] = {
    "ideal": (),
    "dp_replicate": ("parallel.dp_replicate=2",),
    "dp_shard": ("parallel.dp_shard=2",),
    "tp": ("parallel.tp=2",),
    "tp, whole": ("parallel.tp=2", "parallel.sequence_parallel=false"),
    "cp": ("parallel.cp=2",),
    "pp": ("parallel.pp=2", "data.micro_batch=1"),
    "ideal muon": ("optim.name=muon",),
    "muon": ("parallel.dp_shard=2", "optim.name=muon"),
}
IDEAL = {"muon": "ideal muon", "ideal muon": "ideal muon"}


def main() -> None:
    """Measure and print each case."""
    options = parse_arguments()
    results = Results("layouts", torch.device("cpu"))
    layouts = list(dict.fromkeys(IDEAL.get(each, "ideal") for each in options.layouts)) + options.layouts
    for model in options.models:
        for precision in options.precision:
            overrides = [f"precision={precision}", *options.overrides]
            turns = {
                layout: partial(measure_turn, model, layout, overrides, options.steps)
                for layout in dict.fromkeys(layouts)
            }
            rates_by_layout = take_turns(turns, options.rounds)
            for layout, rates in rates_by_layout.items():
                ideal = rates_by_layout[IDEAL.get(layout, "ideal")]
                ratio = statistics.median(rate / ideal_rate for rate, ideal_rate in zip(rates, ideal, strict=True))
                row = {"model": model, "precision": precision, "layout": layout}
                results.add({**row, "tokens_per_second": statistics.median(rates), "ratio": ratio})
    results.finish(f"{options.rounds} rounds of {options.steps} steps\n\n{report(results)}", options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["gpt2-cpu"], help="default: gpt2-cpu")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=["fp32"], help="default: fp32")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each; default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="steps of a turn, after two others; default: %(default)s")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for train: model.n_layers=2")
    return parse_options(parser)


def measure_turn(model: str, layout: str, overrides: list[str], steps: int) -> float:
    """Measure tokens/s of one turn, in processes started for it."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_rank, (model, layout, overrides, steps, scratch), nprocs=RANKS)
        return min(json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(RANKS))


def _rank(rank: int, model: str, layout: str, overrides: list[str], steps: int, scratch: str) -> None:
    device, alone = torch.device("cpu"), layout in ("ideal", "ideal muon")
    torch.set_num_threads(1)
    keep_freed_memory(device)
    store = dist.FileStore(f"{scratch}/store", RANKS)
    global_batch = make_config(model, overrides).data.global_batch
    if alone:
        config = make_config(model, [*overrides, *LAYOUTS[layout], f"data.global_batch={global_batch // RANKS}"])
    else:
        config = make_config(model, [*overrides, *LAYOUTS[layout]], RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    engine = NativeEngine(config, device)
    _, ranks = engine.dp_rank_and_size
    data = config.data
    rows = torch.randint(config.model.vocab_size, (data.global_batch // ranks, data.seq_len + 1))
    batches = [Batch.build(each[:, :-1], each[:, 1:], CAUSAL) for each in rows.split(data.micro_batch)]
    for step in range(2):
        train_step(engine, batches, config.optim.lr, step)
    _wait_for_all(store, "begin")
    start_time = time.perf_counter()
    for step in range(2, 2 + steps):
        report = train_step(engine, batches, config.optim.lr, step)
    report.loss.item()
    _wait_for_all(store, "end")
    rate = global_batch * data.seq_len * steps / (time.perf_counter() - start_time)
    (Path(scratch) / f"{rank}.json").write_text(json.dumps(rate))
    del engine, report
    gc.collect()  # models must be deleted before the group
    if not alone:
        dist.destroy_process_group()


def _wait_for_all(store: dist.FileStore, where: str) -> None:
    store.add(where, 1)
    while store.add(where, 0) < RANKS:
        time.sleep(0.001)


def report(results: Results) -> str:
    """Format the table."""
    rows = [
        (row["model"], row["precision"], row["layout"], f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}")
        for row in results.rows
    ]
    return format_table(("model", "precision", "layout", "tokens/s", "of ideal"), rows)


if __name__ == "__main__":
    main()
