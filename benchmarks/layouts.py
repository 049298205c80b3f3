"""What a layout costs: two gloo ranks of one thread each, beside two processes that know nothing of each other.

  ideal         each process trains on its half of the batch by itself: no layout can be faster
  dp_replicate, dp_shard, tp, cp, pp
                the axis of `parallel` that has both ranks; pp's microbatches are single sequences
  tp, whole     tensor parallel without sequence_parallel
  muon          dp_shard under optim.name: muon, and `ideal muon` its limit

All have their turns one after another. `ratio` is tokens/s over those of the ideal, the median over the rounds. On a
machine of two cores gloo's threads, and the copies that they make, take their time from the ranks.

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
from dist_llm.train.step import train_step
from measure import DTYPES, take_turns
from models import MODELS, config_of
from results import Results, parse, parser, table

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
    """Measure each case and print."""
    options = arguments()
    results = Results("layouts", torch.device("cpu"))
    layouts = list(dict.fromkeys(IDEAL.get(each, "ideal") for each in options.layouts)) + options.layouts
    for model in options.models:
        for precision in options.precision:
            overrides = [f"precision={precision}", *options.overrides]
            turns = {
                layout: partial(turn, model, layout, overrides, options.steps) for layout in dict.fromkeys(layouts)
            }
            found = take_turns(turns, options.rounds)
            for layout, rates in found.items():
                ideal = found[IDEAL.get(layout, "ideal")]
                ratio = statistics.median(mine / best for mine, best in zip(rates, ideal, strict=True))
                row = {"model": model, "precision": precision, "layout": layout}
                results.add({**row, "tokens_per_second": statistics.median(rates), "ratio": ratio})
    results.finish(f"{options.rounds} rounds of {options.steps} steps\n\n{report(results)}", options.write)


def arguments() -> argparse.Namespace:
    """The command line."""
    top = parser(__doc__)
    top.add_argument("--models", nargs="+", choices=MODELS, default=["gpt2-cpu"], help="default: gpt2-cpu")
    top.add_argument("--precision", nargs="+", choices=DTYPES, default=["fp32"], help="default: fp32")
    top.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all")
    top.add_argument("--rounds", type=int, default=3, help="turns of each; default: %(default)s")
    top.add_argument("--steps", type=int, default=4, help="steps of a turn, after two others; default: %(default)s")
    top.add_argument("overrides", nargs="*", metavar="key=value", help="as for train: model.n_layers=2")
    return parse(top)


def turn(model: str, layout: str, overrides: list[str], steps: int) -> float:
    """Tokens/s of one turn, in processes started for it."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_rank, (model, layout, overrides, steps, scratch), nprocs=RANKS)
        return min(json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(RANKS))


def _rank(rank: int, model: str, layout: str, overrides: list[str], steps: int, scratch: str) -> None:
    device, alone = torch.device("cpu"), layout in ("ideal", "ideal muon")
    torch.set_num_threads(1)
    keep_freed_memory(device)
    store = dist.FileStore(f"{scratch}/store", RANKS)
    whole = config_of(model, overrides).data.global_batch
    if alone:
        config = config_of(model, [*overrides, *LAYOUTS[layout], f"data.global_batch={whole // RANKS}"])
    else:
        config = config_of(model, [*overrides, *LAYOUTS[layout]], RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    engine = NativeEngine(config, device)
    _, ranks = engine.dp_rank_and_size
    data = config.data
    rows = torch.randint(config.model.vocab_size, (data.global_batch // ranks, data.seq_len + 1))
    batches = [Batch.of(each[:, :-1], each[:, 1:], CAUSAL) for each in rows.split(data.micro_batch)]
    for step in range(2):
        train_step(engine, batches, config.optim.lr, step)
    _meet(store, "begin")
    begin = time.perf_counter()
    for step in range(2, 2 + steps):
        report = train_step(engine, batches, config.optim.lr, step)
    report.loss.item()
    _meet(store, "end")
    rate = whole * data.seq_len * steps / (time.perf_counter() - begin)
    (Path(scratch) / f"{rank}.json").write_text(json.dumps(rate))
    del engine, report
    gc.collect()  # models must be gone before the group is
    if not alone:
        dist.destroy_process_group()


def _meet(store: dist.FileStore, where: str) -> None:
    store.add(where, 1)
    while store.add(where, 0) < RANKS:
        time.sleep(0.001)


def report(results: Results) -> str:
    """The table."""
    rows = [
        (row["model"], row["precision"], row["layout"], f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}")
        for row in results.rows
    ]
    return table(("model", "precision", "layout", "tokens/s", "of ideal"), rows)


if __name__ == "__main__":
    main()
