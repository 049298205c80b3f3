"""Time sliding-window attention on a CPU, forward and backward, relative to causal attention without a window.

  causal  causal attention without a window: all earlier tokens
  dense   the window as a boolean mask [B, 1, S, T], which `materialize_mask` makes if bands are not allowed
  bands   blocks of queries that attend only to the keys of their window (`banded_attention`)

All run through dist_llm.models.attention.scaled_dot_product, in fp32. The cases of a sequence length take turns in one
process, so that other work on the machine affects all cases alike. `ratio` is the time of a case over the time of
`causal`, the median over the rounds: below 1, the window saves time. `min_ratio` and `max_ratio` are its extremes.
`cpu_ratio` is the ratio with CPU seconds instead of elapsed time: more reliable on a busy machine, with one thread.
`of_dense` is the CPU time of the case over that of the dense mask of the same window. `chosen` marks the case that the
model uses for a window.

With --cp N, the sequence is split over N gloo processes as in context parallelism, and each case includes the exchange
of keys and values: `causal` and `dense` all-gather them, `bands` receives those that the windows reach. The figures are
those of rank 0, and its CPU seconds include its gloo thread.

A window is a number of tokens, or S/N for the N-th part of the sequence. Windows that are not shorter than the sequence
are left out.

  python benchmarks/window.py
  python benchmarks/window.py --seq-len 8192 --windows 512 S/8 S/2 --heads 32 --kv-heads 8 --head-dim 128
  python benchmarks/window.py --cp 2 --seq-len 4096
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dist_llm.models.attention import AttentionKernel, materialize_mask, scaled_dot_product
from dist_llm.models.attention_mask import CAUSAL, AttentionMask
from dist_llm.models.banded_attention import can_use_bands
from dist_llm.parallel.context_parallel import ContextParallelAttention
from dist_llm.parallel.halo_exchange import chunks_of_rank
from measure import ResourceUsage, measure_seconds, take_turns
from results import Results, format_table, make_parser

CPU = torch.device("cpu")


def main() -> None:
    """Measure and print each case."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    results = Results("window", CPU, f"-cp{options.cp}" if options.cp > 1 else "")
    for row in measure_rows(options) if options.cp == 1 else measure_in_processes(options):
        results.add(row)
    sizes = f"{options.batch} sequences, {options.heads} heads ({options.kv_heads} of keys) of {options.head_dim}"
    results.finish(
        f"{sizes}, fp32; {options.rounds} rounds; *: the choice of the model\n\n{make_report(results)}", options.write
    )


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--seq-len", nargs="+", type=int, default=[1024, 2048, 4096], help="tokens; default: 1024 2048 4096"
    )
    parser.add_argument("--windows", nargs="+", default=["64", "256", "S/4"], help="default: 64 256 S/4")
    parser.add_argument("--batch", type=int, default=1, help="sequences; default: %(default)s")
    parser.add_argument("--heads", type=int, default=8, help="query heads; default: %(default)s")
    parser.add_argument("--kv-heads", type=int, default=2, help="key and value heads; default: %(default)s")
    parser.add_argument("--head-dim", type=int, default=64, help="dimension of a head; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; default: %(default)s")
    parser.add_argument("--cp", type=int, default=1, help="context-parallel ranks; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, help="turns of each case; default: %(default)s")
    return parser.parse_args()


def measure_in_processes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Start a gloo process per context-parallel rank, and return the rows of rank 0."""
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(_run_rank, (options, scratch), nprocs=options.cp)
        return [dict(row) for row in json.loads((Path(scratch) / "rows.json").read_text())]


def _run_rank(rank: int, options: argparse.Namespace, scratch: str) -> None:
    torch.set_num_threads(options.threads)
    store = dist.FileStore(f"{scratch}/store", options.cp)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=options.cp)
    rows = measure_rows(options)
    if rank == 0:
        (Path(scratch) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all cases of all sequence lengths on this rank."""
    return [{"seq_len": seq_len, **row} for seq_len in options.seq_len for row in measure_seq_len(seq_len, options)]


def measure_seq_len(seq_len: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all cases of a sequence length; return one row per case, first that of `causal`."""
    shape = (options.batch, seq_len // options.cp, seq_len)
    full_mask = CAUSAL if options.cp == 1 else shard_mask(seq_len, options)
    masks: dict[tuple[str, int], AttentionMask] = {("causal", 0): full_mask}
    windows = {parse_window(text, seq_len) for text in options.windows}
    for window in sorted(window for window in windows if window < seq_len):
        mask = replace(full_mask, window=window)
        masks["dense", window] = materialize_mask(mask, shape, CPU, dense=True, allow_bands=False)
        masks["bands", window] = mask
    steps = {case: make_step(mask, seq_len, options) for case, mask in masks.items()}
    for step in steps.values():
        step()  # the warm-up
    turns_by_case = take_turns({format_case(case): make_turn(step) for case, step in steps.items()}, options.rounds)
    causal_turns = turns_by_case[format_case(("causal", 0))]
    rows = []
    for kernel, window in masks:
        turns = turns_by_case[format_case((kernel, window))]
        ratios = divide_by_round(turns, causal_turns, "seconds")
        row = {
            "case": kernel,
            "window": window,
            "seconds": statistics.median(turn["seconds"] for turn in turns),
            "ratio": statistics.median(ratios),
            "min_ratio": min(ratios),
            "max_ratio": max(ratios),
            "cpu_ratio": statistics.median(divide_by_round(turns, causal_turns, "cpu_seconds")),
        }
        if window:
            dense_turns = turns_by_case[format_case(("dense", window))]
            row["of_dense"] = statistics.median(divide_by_round(turns, dense_turns, "cpu_seconds"))
            uses_bands = can_use_bands(replace(full_mask, window=window), *shape[1:])
            row["chosen"] = kernel == ("bands" if uses_bands else "dense")
        rows.append(row)
    return rows


def shard_mask(seq_len: int, options: argparse.Namespace) -> AttentionMask:
    """Return the causal mask of the queries of this context-parallel rank."""
    chunks = torch.arange(seq_len).chunk(2 * options.cp)
    positions = torch.cat([chunks[chunk] for chunk in chunks_of_rank(dist.get_rank(), options.cp)])
    return CAUSAL.with_query_positions(positions.expand(options.batch, -1), seq_len)


def parse_window(text: str, seq_len: int) -> int:
    """Return the number of tokens of a window, which is written as a number or as S/N."""
    return seq_len // int(text.removeprefix("S/")) if text.startswith("S/") else int(text)


def make_step(mask: AttentionMask, seq_len: int, options: argparse.Namespace) -> Callable[[], None]:
    """Return a function that runs attention forward and backward, with the same random heads for each mask."""
    generator = torch.Generator().manual_seed(1)

    def make_random(num_heads: int) -> Tensor:
        shape = (options.batch, seq_len // options.cp, num_heads, options.head_dim)
        return torch.randn(shape, generator=generator).requires_grad_()

    attend: Callable[..., Tensor] = partial(scaled_dot_product, dropout=0.0)
    if options.cp > 1:
        kernel = AttentionKernel(dropout=0.0, scale=options.head_dim**-0.5)
        attend = ContextParallelAttention(kernel, init_device_mesh("cpu", (options.cp,)))
    heads = make_random(options.heads), make_random(options.kv_heads), make_random(options.kv_heads)

    def run_once() -> None:
        out_BSHE = attend(*heads, mask)
        torch.autograd.grad(out_BSHE, heads, torch.ones_like(out_BSHE))

    return run_once


def make_turn(step: Callable[[], None]) -> Callable[[], dict[str, float]]:
    """Return a function that takes a step and returns its elapsed seconds and its CPU seconds."""

    def take_turn() -> dict[str, float]:
        usage = ResourceUsage()
        return {"seconds": measure_seconds(step, CPU), **usage.read()}

    return take_turn


def format_case(case: tuple[str, int]) -> str:
    """Return the name of a case (kernel, window)."""
    return f"{case[0]} {case[1]}"


def divide_by_round(turns: list[dict[str, float]], baseline_turns: list[dict[str, float]], name: str) -> list[float]:
    """Return the ratio of two cases in each round."""
    return [turn[name] / baseline[name] for turn, baseline in zip(turns, baseline_turns, strict=True)]


def make_report(results: Results) -> str:
    """Format the table."""
    rows = [
        (
            row["case"] + (" *" if row.get("chosen") else "  "),
            row["seq_len"],
            row["window"] or "",
            f"{row['seconds'] * 1000:,.1f}",
            *(f"{row[name]:.3f}" for name in ("ratio", "min_ratio", "max_ratio", "cpu_ratio")),
            f"{row['of_dense']:.3f}" if "of_dense" in row else "",
        )
        for row in results.rows
    ]
    header = ("case  ", "tokens", "window", "ms", "ratio", "min ratio", "max ratio", "cpu ratio", "of dense")
    return format_table(header, rows)


if __name__ == "__main__":
    main()
