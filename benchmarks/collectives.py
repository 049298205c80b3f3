"""Time the collectives that layouts use, by size, between ranks on this machine: GPUs, or gloo processes.

  all_reduce, all_gather, reduce_scatter    collectives of NCCL or gloo
  gather by messages, reduce by messages    the point-to-point replacements on CPUs (parallel/p2p_collectives.py)

`bytes` is the size of the full tensor, which all ranks have after an all-gather. `rate` is GB/s that a rank sends in a
ring: bytes (p - 1) / p over p ranks, and twice that for an all-reduce, so that kinds can be compared. `cpu` is the CPU
time that a rank spends, including the threads of gloo. All values are medians over rounds in which each kind takes a
turn.

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
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dist_llm.parallel.p2p_collectives import P2PAllGather, P2PReduceScatter
from measure import ResourceUsage, choose_device, measure_seconds, take_turns
from results import Results, format_table, make_parser

CALLS_PER_TURN = 4
Collective = Callable[[], object]


def main() -> None:
    """Measure and print each case."""
    options = parse_arguments()
    device = choose_device()
    results = Results("collectives", device)
    with tempfile.TemporaryDirectory() as scratch:
        rank_args = (options.ranks, device.type, options.megabytes, options.rounds, scratch)
        torch.multiprocessing.spawn(_run_rank, rank_args, nprocs=options.ranks)
        for row in json.loads((Path(scratch) / "rows.json").read_text()):
            results.add(row)
    results.finish(f"{options.ranks} ranks; {options.rounds} rounds\n\n{make_report(results)}", options.write)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="GPUs, or processes of one thread; default: %(default)s")
    parser.add_argument(
        "--megabytes",
        nargs="+",
        type=float,
        default=[0.25, 1, 8, 64],
        help="sizes of the full tensor; default: %(default)s",
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each collective; default: %(default)s")
    return parser.parse_args()


def _run_rank(rank: int, ranks: int, device_type: str, megabytes: list[float], rounds: int, scratch: str) -> None:
    """Measure all sizes on one rank; rank 0 writes the rows to the folder `scratch`."""
    torch.set_num_threads(1)
    device = torch.device(f"cuda:{rank}" if device_type == "cuda" else "cpu")
    backend = "nccl" if device_type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(f"{scratch}/store", ranks), rank=rank, world_size=ranks)
    # Numbers of fp32 elements, divisible by the number of ranks
    element_counts = [int(size * 1e6) // (4 * ranks) * ranks for size in megabytes]
    rows = [row for num_elements in element_counts for row in measure_size(num_elements, device, rounds)]
    if rank == 0:
        (Path(scratch) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def measure_size(num_elements: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Measure each collective with a full tensor of `num_elements` fp32 numbers; return one row per collective."""
    full_tensor, ranks = torch.ones(num_elements, device=device), dist.get_world_size()
    collectives = make_collectives(full_tensor, torch.ones(num_elements // ranks, device=device))
    timers = {name: partial(time_collective, collective, device) for name, collective in collectives.items()}
    take_turns(timers, rounds=1)  # warm up
    times_by_kind = take_turns(timers, rounds)
    rows = []
    for name, times in times_by_kind.items():
        wall_seconds = statistics.median(time.wall_seconds for time in times)
        cpu_seconds = statistics.median(time.cpu_seconds for time in times)
        sent_bytes = full_tensor.nbytes * (ranks - 1) / ranks * (2 if name == "all_reduce" else 1)
        row = {"kind": name, "ranks": ranks, "bytes": full_tensor.nbytes, "seconds": wall_seconds, "cpu": cpu_seconds}
        rows.append({**row, "rate": sent_bytes / wall_seconds / 1e9})
    return rows


class CallTimes(NamedTuple):
    """The time that this rank takes for one call of a collective."""

    wall_seconds: float
    cpu_seconds: float


def time_collective(collective: Collective, device: torch.device) -> CallTimes:
    """Measure CALLS_PER_TURN calls after a barrier, and return the times of one call."""
    dist.barrier()
    usage = ResourceUsage()
    wall_seconds = measure_seconds(lambda: [collective() for _ in range(CALLS_PER_TURN)], device)
    return CallTimes(wall_seconds / CALLS_PER_TURN, usage.read()["cpu_seconds"] / CALLS_PER_TURN)


def make_collectives(full_tensor: Tensor, shard: Tensor) -> dict[str, Collective]:
    """Return {name: function that runs the collective on these tensors}."""
    # Newer releases of torch rename these two functions.
    all_gather = dist.all_gather_single if "all_gather_single" in vars(dist) else dist.all_gather_into_tensor
    reduce_scatter = dist.reduce_scatter_single if "reduce_scatter_single" in vars(dist) else dist.reduce_scatter_tensor
    collectives: dict[str, Collective] = {
        "all_reduce": lambda: dist.all_reduce(full_tensor),
        "all_gather": lambda: all_gather(full_tensor, shard),
        "reduce_scatter": lambda: reduce_scatter(shard, full_tensor),
    }
    group = dist.group.WORLD
    if full_tensor.is_cuda or group is None:
        return collectives
    own_shard = full_tensor.chunk(group.size())[group.rank()]
    p2p_collectives = {
        "gather by messages": lambda: P2PAllGather()(full_tensor, own_shard, group).wait(),
        "reduce by messages": lambda: P2PReduceScatter()(shard, full_tensor, group, dist.ReduceOp.SUM),
    }
    return collectives | p2p_collectives


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
