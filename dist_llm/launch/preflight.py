"""Preflight (`dist-llm check`): find bad or slow nodes before a long run.

Each rank measures and all-gathers its `NodeReport`; `diagnose_nodes` derives the problems from the reports alone. The
process group uses gloo, and NCCL comes last, so that a node without a working GPU can still report.
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
from dist_llm.launch.node_report import NodeReport, diagnose_nodes, format_problems, format_table, group_by_node
from dist_llm.launch.process_group import process_group, select_device
from dist_llm.launch.world import World

MATMUL_SECONDS = 0.5
ROUND_TRIPS = 5
WARMUP, SMALL_REPETITIONS, LARGE_REPETITIONS = 3, 20, 5
SMALL_BYTES, LARGE_BYTES = 4, {"cpu": 8 * 2**20, "cuda": 64 * 2**20}
EXIT_DELAY_SECONDS = 3.0  # torchrun ends all ranks with the first; the others need time to print
LOG_WIDTH = 120  # columns of the table when the output is no terminal
PACKAGE = Path(__file__).parents[1]


class PreflightTimeout:
    """Ends this process after `seconds` and reports the phase that hangs. The collectives have no other timeout."""

    def __init__(self, world: World, seconds: float) -> None:
        self.world, self.seconds = world, seconds
        self.phase = "the rendezvous of all ranks"
        self.problems: list[str] = []  # on rank 0: what the first measurements showed
        self.file: Path | None = None  # the test file in --directory, to be removed

    @contextmanager
    def running(self) -> Iterator[None]:
        timer = threading.Timer(self.seconds, self._end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def format_report(self, problem: str) -> str:
        """Format the problems so far and this rank's as one message."""
        return format_problems([*self.problems, f"{self.world.host}: rank {self.world.rank} {problem}"])

    def remove_file(self) -> None:
        with suppress(OSError):
            if self.file:
                self.file.unlink(missing_ok=True)

    def _end(self) -> None:
        print(
            f"error: {self.format_report(f'is still in {self.phase} after {self.seconds:g} s')}",
            file=sys.stderr,
            flush=True,
        )
        self.remove_file()
        time.sleep(EXIT_DELAY_SECONDS)
        os._exit(2)


def run_preflight(directory: Path, seconds: float, world: World) -> None:
    """Measure all ranks within `seconds`; rank 0 prints a table with a row per node.

    Raises ConfigError on rank 0 with one line per problem; the other ranks then exit with code 2 and print nothing.
    """
    timeout = PreflightTimeout(world, seconds)
    with timeout.running():
        try:
            # The process group's timeout comes later than ours, which can name the phase.
            with process_group(world, torch.device("cpu"), seconds + 60, even_if_single=True):
                reports = measure_ranks(world, directory, timeout)
        except RuntimeError as error:
            raise ConfigError(timeout.format_report(f"failed in {timeout.phase}: {_one_line(error)}")) from error
    problems = diagnose_nodes(reports)
    if world.is_main:
        console = Console()
        console.width = console.width if console.is_terminal else LOG_WIDTH
        console.print(format_table(reports))
        if problems:
            raise ConfigError(format_problems(problems))
        console.print(
            f"no problem found; ranks: {world.world_size}, nodes: {len(group_by_node(reports))}", highlight=False
        )
    elif problems:
        time.sleep(EXIT_DELAY_SECONDS)
        raise SystemExit(2)


def measure_ranks(world: World, directory: Path, timeout: PreflightTimeout) -> list[NodeReport]:
    """Measure on all ranks and return the reports by rank. Raises RuntimeError if a collective fails."""
    timeout.phase = "the clock"
    clock = measure_clock_offset()
    timeout.phase = "--directory"
    sees_shared_file, failures = check_shared_file(directory, timeout)
    timeout.phase = "versions and matrix products"
    device, rate = torch.device("cpu"), math.nan
    try:
        device = select_device(world)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        rate = measure_matmul_tflops(device)
    except (ConfigError, RuntimeError) as error:
        failures.append(_one_line(error))
    report = NodeReport(
        world.rank,
        world.host,
        collect_versions(device),
        clock_offset_seconds=clock,
        free_gib=_free_gib(directory),
        sees_shared_file=sees_shared_file,
        matmul_tflops=rate,
        failures=tuple(failures),
    )
    timeout.phase = "the exchange of reports"
    reports = _all_gather(report)
    timeout.problems = diagnose_nodes(reports) if world.is_main else []
    if any(math.isnan(each.matmul_tflops) or each.versions["GPU"] == "none" for each in reports):
        device = torch.device("cpu")
    timeout.phase = "the all-reduce of all ranks"
    latency, rate = measure_all_reduce(device, dist.new_group(backend=_backend(device)))
    neighbour = measure_neighbour_bandwidth(world, [each.host for each in reports], device, timeout)
    report = replace(report, all_reduce_us=latency, all_reduce_gb_per_second=rate, neighbour_gb_per_second=neighbour)
    return _all_gather(report)


def measure_clock_offset() -> float:
    """Measure this rank's time.time() minus rank 0's by the shortest of a few round trips. Call it on all ranks."""
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


def check_shared_file(
    directory: Path, timeout: PreflightTimeout, wait_seconds: float = 10
) -> tuple[bool | None, list[str]]:
    """Check that this rank sees a file that rank 0 writes to `directory`. Returns (whether it does, problems).

    If rank 0 cannot write: (None, [reason]) on rank 0 and (None, []) elsewhere. Call it on all ranks. The file is
    removed.
    """
    message = [secrets.token_hex(16), ""]
    try:
        if dist.get_rank() == 0:
            timeout.file = directory / f".dist-llm-check-{message[0]}"
            try:
                timeout.file.write_text(message[0], encoding="utf-8")
            except OSError as error:
                message[1] = f"--directory {directory} cannot be written to: {error.strerror}"
        dist.broadcast_object_list(message)
        token, failure = message
        if failure:
            return None, [failure] if timeout.file else []
        end = time.monotonic() + wait_seconds
        while not (seen := _has_content(directory / f".dist-llm-check-{token}", token)) and time.monotonic() < end:
            time.sleep(0.2)
        dist.barrier()
        return seen, []
    finally:
        timeout.remove_file()


def _has_content(file: Path, content: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == content
    except OSError:
        return False


def _free_gib(directory: Path) -> float:
    try:
        return shutil.disk_usage(directory).free / 2**30
    except OSError:
        return math.nan


def collect_versions(device: torch.device) -> dict[str, str]:
    """Return the versions that must be equal on all nodes; `none` or `unknown` for missing software."""
    source = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(PACKAGE.rglob("*.py")))).hexdigest()[:12]
    installed = {
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
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            installed[package] = "none"
    return installed


def measure_matmul_tflops(device: torch.device) -> float:
    """Measure TFLOP/s of square matrix products, the best of half a second: bf16 on a GPU, fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    factor = torch.randn(size, size, device=device).to(dtype)
    best, end = 0.0, time.perf_counter() + MATMUL_SECONDS
    while (start := time.perf_counter()) < end:
        factor @ factor
        _synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best / 1e12


def measure_all_reduce(device: torch.device, group: Any) -> tuple[float, float]:
    """Measure an all-reduce: (latency of 4 bytes in microseconds, bandwidth of a large tensor in GB/s), both medians.

    The bandwidth is bytes / seconds * 2 (p - 1) / p, the traffic of one link in a ring of p ranks; NaN for one rank.
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
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[WARMUP:])


def measure_neighbour_bandwidth(
    world: World, hosts: Sequence[str], device: torch.device, timeout: PreflightTimeout
) -> float:
    """Measure GB/s of an all-reduce over this node's ranks and the next node's; NaN on the last node.

    `hosts` are by rank. Disjoint pairs of nodes run at the same time, so a hundred nodes take as long as three.
    """
    pairs, rate = list(pairwise(dict.fromkeys(hosts))), math.nan
    pairs = pairs[::2] + pairs[1::2]
    members = [[rank for rank, host in enumerate(hosts) if host in pair] for pair in pairs]
    groups = [dist.new_group(ranks, backend=_backend(device)) for ranks in members]
    for pair, group in zip(pairs, groups, strict=True):
        if world.host in pair:
            timeout.phase = f"the all-reduce of {pair[0]} and {pair[1]}"
            measured = measure_all_reduce(device, group)[1]
            rate = measured if world.host == pair[0] else rate
    return rate


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _all_gather(report: NodeReport) -> list[NodeReport]:
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    return reports


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _first_line(*command: str) -> str:
    """Return the first line of a program's output; empty if the program is missing or fails."""
    try:
        ran = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ran.stdout.partition("\n")[0].strip()
