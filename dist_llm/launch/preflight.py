"""The `check` command: what is wrong with which node, said in a minute and before a long run.

Each rank measures and hands its `Facts` to all; `judge` sees what is wrong from them alone. Ranks meet over gloo
and try NCCL last, so that a node without a working GPU can still be heard.
"""

import hashlib
import math
import os
import platform
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from dist_llm import __version__
from dist_llm.errors import ConfigError
from dist_llm.launch.group import device_of, process_group
from dist_llm.launch.verdict import Facts, by_node, judge, listed, table
from dist_llm.launch.world import World

MATMUL_SECONDS = 0.5
ROUND_TRIPS = 5
WARMUP, SMALL_REPETITIONS, LARGE_REPETITIONS = 3, 20, 5
SMALL_BYTES, LARGE_BYTES = 4, {"cpu": 8 * 2**20, "cuda": 64 * 2**20}
PAUSE_SECONDS = 3.0  # of a rank before its end, so that the others are heard: torchrun ends them with it
WIDTH = 120  # of the table in a log
PACKAGE = Path(__file__).parents[1]


class Watch:
    """What this rank is at, and its end after `seconds`: nothing else stops a collective that waits for ever."""

    def __init__(self, world: World, seconds: float) -> None:
        self.world, self.seconds = world, seconds
        self.at = "the meeting of all ranks"
        self.found: list[str] = []  # on rank 0, before it comes to what may hang
        self.file: Path | None = None  # to be removed

    @contextmanager
    def running(self) -> Iterator[None]:
        timer = threading.Timer(self.seconds, self._end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def report(self, what: str) -> str:
        """The problems so far, and this rank's."""
        return listed([*self.found, f"{self.world.host}: rank {self.world.rank} {what}"])

    def remove_file(self) -> None:
        with suppress(OSError):
            if self.file:
                self.file.unlink(missing_ok=True)

    def _end(self) -> None:
        print(f"error: {self.report(f'is still at {self.at} after {self.seconds:g} s')}", file=sys.stderr, flush=True)
        self.remove_file()
        time.sleep(PAUSE_SECONDS)
        os._exit(2)


def check(directory: Path, seconds: float, world: World) -> None:
    """Measure for at most so many seconds; rank 0 prints a table by node.

    Raises ConfigError on rank 0 with a line for each problem; the other ranks then end in silence with exit code 2.
    """
    watch = Watch(world, seconds)
    with watch.running():
        try:
            # The group's own limit comes later than the watch, which knows what hangs.
            with process_group(world, torch.device("cpu"), seconds + 60, alone=True):
                facts = measure(world, directory, watch)
        except RuntimeError as error:
            raise ConfigError(watch.report(f"failed at {watch.at}: {_one_line(error)}")) from error
    problems = judge(facts)
    if world.main:
        console = Console()
        console.width = console.width if console.is_terminal else WIDTH
        console.print(table(facts))
        if problems:
            raise ConfigError(listed(problems))
        console.print(f"no problem found; ranks: {world.size}, nodes: {len(by_node(facts))}", highlight=False)
    elif problems:
        time.sleep(PAUSE_SECONDS)
        raise SystemExit(2)


def measure(world: World, directory: Path, watch: Watch) -> list[Facts]:
    """The facts of all ranks, in their order. Raises RuntimeError where a collective fails."""
    watch.at = "the clock"
    clock = clock_seconds()
    watch.at = "--directory"
    sees, failures = sees_file(directory, watch)
    watch.at = "versions and matrix products"
    device, rate = torch.device("cpu"), math.nan
    try:
        device = device_of(world)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        rate = matmul_tflops(device)
    except (ConfigError, RuntimeError) as error:
        failures.append(_one_line(error))
    facts = Facts(
        world.rank,
        world.host,
        versions(device),
        clock_seconds=clock,
        free_gib=_free_gib(directory),
        sees_file=sees,
        matmul_tflops=rate,
        failures=tuple(failures),
    )
    watch.at = "the exchange of what the ranks found"
    everyone = _gather(facts)
    watch.found = judge(everyone) if world.main else []
    if any(math.isnan(each.matmul_tflops) or each.versions["GPU"] == "none" for each in everyone):
        device = torch.device("cpu")
    watch.at = "the all-reduce of all ranks"
    latency, rate = all_reduce(device, dist.new_group(backend=_backend(device)))
    following = next_node_rate(world, [each.host for each in everyone], device, watch)
    return _gather(replace(facts, all_reduce_us=latency, all_reduce_gb_per_second=rate, next_gb_per_second=following))


def clock_seconds() -> float:
    """This rank's time.time() minus rank 0's, by the shortest of a few round trips. All ranks call it."""
    stamp = torch.zeros(1, dtype=torch.float64)
    if dist.get_rank() == 0:
        for other in range(1, dist.get_world_size()):
            for _ in range(ROUND_TRIPS):
                dist.recv(stamp, other)
                dist.send(stamp.fill_(time.time()), other)
        return 0.0
    trips = []
    for _ in range(ROUND_TRIPS):
        sent = time.time()
        dist.send(stamp, 0)
        dist.recv(stamp, 0)
        received = time.time()
        trips.append((received - sent, (sent + received) / 2 - stamp.item()))
    return min(trips)[1]


def sees_file(directory: Path, watch: Watch, wait_seconds: float = 10) -> tuple[bool | None, list[str]]:
    """Whether a file that rank 0 writes shows up here in time; None, and on rank 0 why, if it cannot be written.

    All ranks call it. The file is gone afterwards.
    """
    said = [secrets.token_hex(16), ""]
    try:
        if dist.get_rank() == 0:
            watch.file = directory / f".dist-llm-check-{said[0]}"
            try:
                watch.file.write_text(said[0], encoding="utf-8")
            except OSError as error:
                said[1] = f"--directory {directory} cannot be written to: {error.strerror}"
        dist.broadcast_object_list(said)
        token, failure = said
        if failure:
            return None, [failure] if watch.file else []
        end = time.monotonic() + wait_seconds
        while not (seen := _holds(directory / f".dist-llm-check-{token}", token)) and time.monotonic() < end:
            time.sleep(0.2)
        dist.barrier()
        return seen, []
    finally:
        watch.remove_file()


def _holds(file: Path, content: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == content
    except OSError:
        return False


def _free_gib(directory: Path) -> float:
    try:
        return shutil.disk_usage(directory).free / 2**30
    except OSError:
        return math.nan


def versions(device: torch.device) -> dict[str, str]:
    """What has to be equal on all nodes; `none` or `unknown` where something is not there."""
    source = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(PACKAGE.rglob("*.py")))).hexdigest()[:12]
    found = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "none",
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "none",
        "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "dist_llm": f"{__version__} (source {source})",
        "the commit of dist_llm": _first_line("git", "rev-parse", "HEAD") or "unknown",
    }
    for package in ("deepspeed", "accelerate"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found


def matmul_tflops(device: torch.device) -> float:
    """TFLOP/s of square products, bf16 on a GPU and fp32 on a CPU: the best within half a second."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    factor = torch.randn(size, size, device=device).to(dtype)
    best, end = 0.0, time.perf_counter() + MATMUL_SECONDS
    while (start := time.perf_counter()) < end:
        factor @ factor
        _wait_for(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best / 1e12


def all_reduce(device: torch.device, group: Any) -> tuple[float, float]:
    """(microseconds of the sum of a number, GB/s of a large one) in the group, whose ranks all call it: medians.

    The rate is bytes / seconds * 2 (p - 1) / p, what a link of a ring of p ranks carries; NaN for one rank.
    """
    ranks, size = dist.get_world_size(group), LARGE_BYTES[device.type]
    latency = _all_reduce_seconds(SMALL_BYTES, SMALL_REPETITIONS, device, group)
    seconds = _all_reduce_seconds(size, LARGE_REPETITIONS, device, group)
    return latency * 1e6, size / seconds * 2 * (ranks - 1) / ranks / 1e9 if ranks > 1 else math.nan


def _all_reduce_seconds(size: int, repetitions: int, device: torch.device, group: Any) -> float:
    values = torch.zeros(size // 4, device=device)
    seconds = []
    for _ in range(WARMUP + repetitions):
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        _wait_for(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[WARMUP:])


def next_node_rate(world: World, hosts: Sequence[str], device: torch.device, watch: Watch) -> float:
    """GB/s of an all-reduce of this node's ranks and the next node's; NaN on the last node. `hosts` is by rank.

    Pairs without a common node are measured at the same time, so that a hundred nodes take as long as three.
    """
    pairs, rate = list(pairwise(dict.fromkeys(hosts))), math.nan
    pairs = pairs[::2] + pairs[1::2]
    members = [[rank for rank, host in enumerate(hosts) if host in pair] for pair in pairs]
    groups = [dist.new_group(ranks, backend=_backend(device)) for ranks in members]
    for pair, group in zip(pairs, groups, strict=True):
        if world.host in pair:
            watch.at = f"the all-reduce of {pair[0]} and {pair[1]}"
            measured = all_reduce(device, group)[1]
            rate = measured if world.host == pair[0] else rate
    return rate


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gather(facts: Facts) -> list[Facts]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, facts)
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _first_line(*command: str) -> str:
    """What a program prints first; nothing where it is missing or fails."""
    try:
        ran = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ran.stdout.partition("\n")[0].strip()
