"""Seconds of the collectives that layouts are made of, by size, between ranks of this machine: GPUs, or gloo processes.

  all_reduce, all_gather, reduce_scatter    of the process group
  gather by messages, reduce by messages    what ranks do on CPUs (dist_llm/parallel/p2p_collectives.py)

`bytes` are those of the whole: what all ranks have after an all-gather. `rate` is GB/s that a rank sends if it sends
as in a ring, bytes (p - 1) / p over p ranks and twice that for an all-reduce, so that kinds can be compared; `cpu` the
seconds of CPU that a rank spends on it, gloo's threads included. Medians over turns in which all kinds take part.

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
from measure import Strain, any_device, seconds, take_turns
from results import Results, parser, table

REPETITIONS = 4  # of a kind in one turn
Work = Callable[[], object]


def main() -> None:
    """Measure each case and print."""
    options = arguments()
    device = any_device()
    results = Results("collectives", device)
    with tempfile.TemporaryDirectory() as scratch:
        rank = (options.ranks, device.type, options.megabytes, options.rounds, scratch)
        torch.multiprocessing.spawn(_rank, rank, nprocs=options.ranks)
        for row in json.loads((Path(scratch) / "rows.json").read_text()):
            results.add(row)
    results.finish(f"{options.ranks} ranks; {options.rounds} rounds\n\n{report(results)}", options.write)


def arguments() -> argparse.Namespace:
    """The command line."""
    top = parser(__doc__)
    top.add_argument("--ranks", type=int, default=2, help="GPUs, or processes of one thread; default: %(default)s")
    sizes = [0.25, 1, 8, 64]
    top.add_argument("--megabytes", nargs="+", type=float, default=sizes, help="default: %(default)s")
    top.add_argument("--rounds", type=int, default=9, help="turns of each; default: %(default)s")
    return top.parse_args()


def _rank(rank: int, ranks: int, kind: str, megabytes: list[float], rounds: int, scratch: str) -> None:
    torch.set_num_threads(1)
    device = torch.device(f"cuda:{rank}" if kind == "cuda" else "cpu")
    backend = "nccl" if kind == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(f"{scratch}/store", ranks), rank=rank, world_size=ranks)
    rows = [row for size in megabytes for row in measured(int(size * 1e6) // (4 * ranks) * ranks, device, rounds)]
    if rank == 0:
        (Path(scratch) / "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def measured(elements: int, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """A row for each kind, of a whole of so many fp32 numbers."""
    whole, ranks = torch.ones(elements, device=device), dist.get_world_size()
    kinds = works(whole, torch.ones(elements // ranks, device=device))
    turns = {name: partial(turn, work, device) for name, work in kinds.items()}
    take_turns(turns, 1)
    found = take_turns(turns, rounds)
    rows = []
    for name, times in found.items():
        passed, cpu = (statistics.median(each) for each in zip(*times, strict=True))
        sent = whole.nbytes * (ranks - 1) / ranks * (2 if name == "all_reduce" else 1)
        row = {"kind": name, "ranks": ranks, "bytes": whole.nbytes, "seconds": passed, "cpu": cpu}
        rows.append({**row, "rate": sent / passed / 1e9})
    return rows


def turn(work: Work, device: torch.device) -> tuple[float, float]:
    """Seconds of one, and of this rank's CPU."""
    dist.barrier()
    strain = Strain()
    taken = seconds(lambda: [work() for _ in range(REPETITIONS)], device)
    return taken / REPETITIONS, strain.taken()["cpu_seconds"] / REPETITIONS


def works(whole: Tensor, part: Tensor) -> dict[str, Work]:
    """The kinds, by name."""
    gather = dist.all_gather_single if "all_gather_single" in vars(dist) else dist.all_gather_into_tensor
    reduce = dist.reduce_scatter_single if "reduce_scatter_single" in vars(dist) else dist.reduce_scatter_tensor
    found: dict[str, Work] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: gather(whole, part),
        "reduce_scatter": lambda: reduce(part, whole),
    }
    group = dist.group.WORLD
    if whole.is_cuda or group is None:
        return found
    by_messages = {
        "gather by messages": lambda: P2PAllGather()(whole, whole.chunk(group.size())[group.rank()], group).wait(),
        "reduce by messages": lambda: P2PReduceScatter()(part, whole, group, dist.ReduceOp.SUM),
    }
    return found | by_messages


def report(results: Results) -> str:
    """The table."""
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
    return table(("kind", "MB", "ms", "ms of CPU", "GB/s sent"), rows)


if __name__ == "__main__":
    main()
