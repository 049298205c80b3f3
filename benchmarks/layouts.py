"""Measure the cost of a layout: two gloo ranks of one thread each, compared with two independent processes.

  ideal         each process trains on half of the batch without communication: no layout can be faster
  dp_replicate, dp_shard, tp, cp, pp
                this axis of `parallel` is 2; with pp a microbatch is one sequence
  tp, sequence_parallel off
                tensor parallel, with replicated activations outside the matrix products
  muon          dp_shard with optim.name: muon; compared with `ideal muon`

The layouts take turns. `ratio` is tokens/s relative to the ideal, the median over the rounds. On a machine of two cores
the threads of gloo compete with the ranks for the cores.

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
from dist_llm.launch.host_memory import keep_freed_memory
from dist_llm.models.attention_mask import CAUSAL
from dist_llm.objectives.batch import Batch
from dist_llm.training.step import train_step
from measure import DTYPES, take_turns
from named_models import NAMED_MODELS, make_named_config
from results import Results, format_table, make_parser, parse_options

RANKS = 2
LAYOUTS: dict[str, tuple[str, ...]] = {
    "ideal": (),
    "dp_replicate": ("parallel.dp_replicate=2",),
    "dp_shard": ("parallel.dp_shard=2",),
    "tp": ("parallel.tp=2",),
    "tp, sequence_parallel off": ("parallel.tp=2", "parallel.sequence_parallel=false"),
    "cp": ("parallel.cp=2",),
    "pp": ("parallel.pp=2", "data.micro_batch=1"),
    "ideal muon": ("optim.name=muon",),
    "muon": ("parallel.dp_shard=2", "optim.name=muon"),
}
# The layout with which a layout is compared; for all others it is `ideal`.
IDEAL_OF = {"muon": "ideal muon", "ideal muon": "ideal muon"}


def main() -> None:
    """Measure and print each case."""
    options = parse_arguments()
    results = Results("layouts", torch.device("cpu"))
    ideals = [IDEAL_OF.get(layout, "ideal") for layout in options.layouts]
    layouts = list(dict.fromkeys([*ideals, *options.layouts]))
    for model in options.models:
        for precision in options.precision:
            overrides = [f"precision={precision}", *options.overrides]
            turns = {layout: partial(measure_turn, model, layout, overrides, options.steps) for layout in layouts}
            rates_by_layout = take_turns(turns, options.rounds)
            for layout, rates in rates_by_layout.items():
                ideal_rates = rates_by_layout[IDEAL_OF.get(layout, "ideal")]
                ratio = statistics.median(rate / ideal for rate, ideal in zip(rates, ideal_rates, strict=True))
                row = {"model": model, "precision": precision, "layout": layout}
                results.add({**row, "tokens_per_second": statistics.median(rates), "ratio": ratio})
    results.finish(f"{options.rounds} rounds of {options.steps} steps\n\n{make_report(results)}", options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=NAMED_MODELS, default=["gpt2-cpu"], help="default: gpt2-cpu")
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=["fp32"], help="default: fp32")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: all")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each layout; default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=4, help="timed steps of a turn, after two to warm up; default: %(default)s"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys: model.n_layers=2")
    return parse_options(parser)


def measure_turn(model: str, layout: str, overrides: list[str], steps: int) -> float:
    """Start two ranks, train `steps` steps, and return tokens/s of the slower rank."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_run_rank, (model, layout, overrides, steps, scratch), nprocs=RANKS)
        return min(json.loads((Path(scratch) / f"{rank}.json").read_text()) for rank in range(RANKS))


def _run_rank(rank: int, model: str, layout: str, overrides: list[str], steps: int, scratch: str) -> None:
    """Train in a layout on one rank and write its measurements to the folder `scratch`."""
    device, is_ideal = torch.device("cpu"), layout in ("ideal", "ideal muon")
    torch.set_num_threads(1)
    if device.type == "cpu":
        keep_freed_memory()
    store = dist.FileStore(f"{scratch}/store", RANKS)
    global_batch = make_named_config(model, overrides).data.global_batch
    if is_ideal:
        config = make_named_config(model, [*overrides, *LAYOUTS[layout], f"data.global_batch={global_batch // RANKS}"])
    else:
        config = make_named_config(model, [*overrides, *LAYOUTS[layout]], ranks=RANKS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    engine = NativeEngine(config, device)
    _, dp_size = engine.dp_rank_and_size
    data = config.data
    windows = torch.randint(config.model.vocab_size, (data.global_batch // dp_size, data.seq_len + 1))
    microbatches = [Batch.build(ids[:, :-1], ids[:, 1:], CAUSAL) for ids in windows.split(data.micro_batch)]
    for step in range(2):
        train_step(engine, microbatches, config.optim.lr, step)
    _wait_for_all(store, "begin")
    start_time = time.perf_counter()
    for step in range(2, 2 + steps):
        report = train_step(engine, microbatches, config.optim.lr, step)
    report.loss.item()
    _wait_for_all(store, "end")
    tokens_per_second = global_batch * data.seq_len * steps / (time.perf_counter() - start_time)
    (Path(scratch) / f"{rank}.json").write_text(json.dumps(tokens_per_second))
    del engine, report
    gc.collect()  # models must be deleted before the process group
    if not is_ideal:
        dist.destroy_process_group()


def _wait_for_all(store: dist.FileStore, barrier_name: str) -> None:
    """Wait for all ranks. The ideal has no process group, hence the store."""
    store.add(barrier_name, 1)
    while store.add(barrier_name, 0) < RANKS:
        time.sleep(0.001)


def make_report(results: Results) -> str:
    """Format the table."""
    rows = [
        (row["model"], row["precision"], row["layout"], f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}")
        for row in results.rows
    ]
    return format_table(("model", "precision", "layout", "tokens/s", "of ideal"), rows)


if __name__ == "__main__":
    main()
