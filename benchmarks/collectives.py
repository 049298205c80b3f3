"""Time the collectives that layouts use, by size, between ranks of this machine: GPUs, or gloo processes.

  all_reduce, all_gather, reduce_scatter    of the process group
  gather by messages, reduce by messages    those of ranks on CPUs (dist_llm/parallel/p2p_collectives.py)

`bytes` is the size of the full tensor, which all ranks have after an all-gather. `rate` is GB/s that a rank sends in a
ring: bytes (p - 1) / p over p ranks, and twice that for an all-reduce, so that kinds can be compared. `cpu` is the CPU
time that a rank spends, gloo's threads included. All values are medians over rounds in which each kind takes a turn.

  python benchmarks/collectives.py
  python benchmarks/collectives.py --ranks 4 --megabytes 1 64
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_llm.parallel.p2p_collectives import P2PAllGather, P2PReduceScatter
from measure import ResourceUsage, choose_device, measure_seconds, take_turns
from results import Results, format_table, make_parser

REPETITIONS = 4  # of a collective in one turn
Collective = Callable[[], object]


def main() -> None:
    """Measure and print each case."""
    options = parse_arguments()
    device = choose_device()
    results = Results("collectives", device)
    with tempfile.TemporaryDirectory() as scratch:
        rank = (options.ranks, device.type, options.megabytes, options.rounds, scratch)
        torch.multiprocessing.spawn(_run_rank, rank, nprocs=options.ranks)
        for row in json.loads((Path(scratch) / "rows.json").read_text()):
            results.add(row)
    results.finish(f"{options.ranks} ranks; {options.rounds} rounds\n\n{make_report(results)}", options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="GPUs, or processes of one thread; default: %(default)s")
    sizes = [0.25, 1, 8, 64]
    parser.add_argument("--megabytes", nargs="+", type=float, default=sizes, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each; default: %(default)s")
    return parser.parse_args()


def _run_rank(rank: int, ranks: int, kind: str, megabytes: list[float], rounds: int, scratch: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(f"cuda:{rank}" if kind == "cuda" else "cpu")
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(f"{scratch}/store", ranks), rank=rank, world_size=ranks)
    rows = [row for size in megabytes for row in measure_size(int(size * 1e6) // (4 * ranks) * ranks, device, rounds)]
    if rank == 0:
        (Path(scratch) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure_size(elements: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Measure each kind, one row each, with a full tensor of `elements` fp32 numbers."""
    full_tensor, ranks = torch.ones(elements, device=device), dist.get_world_size()
    kinds = make_collectives(full_tensor, torch.ones(elements // ranks, device=device))
    timers = {name: partial(time_collective, collective, device) for name, collective in kinds.items()}
    take_turns(timers, 1)
    times_by_kind = take_turns(timers, rounds)
    rows = []
    for name, times in times_by_kind.items():
        median_seconds, cpu = (statistics.median(each) for each in zip(*times, strict=True))
        sent_bytes = full_tensor.nbytes * (ranks - 1) / ranks * (2 if name == "all_reduce" else 1)
        row = {"kind": name, "ranks": ranks, "bytes": full_tensor.nbytes, "seconds": median_seconds, "cpu": cpu}
        rows.append({**row, "rate": sent_bytes / median_seconds / 1e9})
    return rows


def time_collective(collective: Collective, device: torch.device) -> tuple[float, float]:
    """Time one call: its seconds, and this rank's CPU seconds."""
    dist.barrier()
    usage = ResourceUsage()
    elapsed = measure_seconds(lambda: [collective() for _ in range(REPETITIONS)], device)
    return elapsed / REPETITIONS, usage.read()["cpu_seconds"] / REPETITIONS


def make_collectives(full_tensor: Tensor, shard: Tensor) -> dict[str, Collective]:
    """Return the collectives by name."""
    gather = dist.all_gather_single if "all_gather_single" in vars(dist) else dist.all_gather_into_tensor
    reduce = dist.reduce_scatter_single if "reduce_scatter_single" in vars(dist) else dist.reduce_scatter_tensor
    collectives: dict[str, Collective] = {
        "all_reduce": lambda: dist.all_reduce(full_tensor),
        "all_gather": lambda: gather(full_tensor, shard),
        "reduce_scatter": lambda: reduce(shard, full_tensor),
    }
    group = dist.group.WORLD
    if full_tensor.is_cuda or group is None:
        return collectives
    by_messages = {
        "gather by messages": lambda: P2PAllGather()(
            full_tensor, full_tensor.chunk(group.size())[group.rank()], group
        ).wait(),
        "reduce by messages": lambda: P2PReduceScatter()(shard, full_tensor, group, dist.ReduceOp.SUM),
    }
    return collectives | by_messages


def make_report(results: Results) -> str:
    """Format the table."""
    rows = [
        (
            row["kind"],
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['seconds'] * 1e3:.2f}",
            f"{row['cpu'] * 1e3:.2f}",
            f"{row['rate']:.2f}",
        )
        for row in results.rows
    ]
    return format_table(("kind", "MB", "ms", "ms of CPU", "GB/s sent"), rows)


if __name__ == "__main__":
    main()
