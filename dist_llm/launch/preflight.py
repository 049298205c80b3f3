"""Preflight (`dist-llm check`): find bad or slow nodes before a long run.

Each rank measures a `NodeReport`, and the ranks all-gather the reports. `diagnose_nodes` finds the problems in them.
The process group uses gloo, and NCCL is used last, so that a node without a working GPU can still report.
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

MATMUL_SECONDS = 0.5  # duration of the matmul measurement
NUM_ROUND_TRIPS = 5  # of the clock measurement
NUM_WARMUPS, NUM_SMALL_REPETITIONS, NUM_LARGE_REPETITIONS = 3, 20, 5  # of the all-reduce measurements
SMALL_BYTES, LARGE_BYTES = 4, {"cpu": 8 * 2**20, "cuda": 64 * 2**20}
EXIT_DELAY_SECONDS = 3.0  # torchrun ends all ranks when one exits, and the other ranks need time to print
LOG_COLUMNS = 120  # width of the table if the output is not a terminal
PACKAGE_DIRECTORY = Path(__file__).parents[1]


class PreflightTimeout:
    """Ends this process after `seconds` and reports the phase that hangs."""

    def __init__(self, world: World, seconds: float) -> None:
        self.world, self.seconds = world, seconds
        self.phase = "the rendezvous of all ranks"
        self.problems: list[str] = []  # on rank 0: problems that the first measurements show
        self.file: Path | None = None  # test file in --directory, which is removed at the end

    @contextmanager
    def running(self) -> Iterator[None]:
        """Limit the duration of the block."""
        timer = threading.Timer(self.seconds, self._end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def format_report(self, problem: str) -> str:
        """Format the problems so far, and `problem` of this rank, as one message."""
        return format_problems([*self.problems, f"{self.world.host}: rank {self.world.rank} {problem}"])

    def remove_file(self) -> None:
        """Remove the test file, if there is one."""
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
    """Measure all ranks within `seconds`. Rank 0 prints a table with one row per node.

    If there are problems, rank 0 raises ConfigError with one line per problem. The other ranks exit with code 2 and
    print nothing.
    """
    timeout = PreflightTimeout(world, seconds)
    with timeout.running():
        try:
            # The timeout of the process group comes later than `timeout`, which names the phase.
            with process_group(world, torch.device("cpu"), seconds + 60, even_if_single=True):
                reports = measure_ranks(world, directory, timeout)
        except RuntimeError as error:
            raise ConfigError(timeout.format_report(f"failed in {timeout.phase}: {_one_line(error)}")) from error
    problems = diagnose_nodes(reports)
    if world.is_main:
        console = Console()
        console.width = console.width if console.is_terminal else LOG_COLUMNS
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
    clock_offset = measure_clock_offset()
    timeout.phase = "--directory"
    sees_shared_file, failures = try_shared_file(directory, timeout)
    timeout.phase = "versions and matrix products"
    device, tflops = torch.device("cpu"), math.nan
    try:
        device = select_device(world)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        tflops = measure_matmul_tflops(device)
    except (ConfigError, RuntimeError) as error:
        failures.append(_one_line(error))
    local_report = NodeReport(
        world.rank,
        world.host,
        collect_versions(device),
        clock_offset_seconds=clock_offset,
        free_gib=_free_gib(directory),
        sees_shared_file=sees_shared_file,
        matmul_tflops=tflops,
        failures=tuple(failures),
    )
    timeout.phase = "the exchange of reports"
    reports = _all_gather(local_report)
    timeout.problems = diagnose_nodes(reports) if world.is_main else []
    if any(math.isnan(report.matmul_tflops) or report.versions["GPU"] == "none" for report in reports):
        device = torch.device("cpu")
    timeout.phase = "the all-reduce of all ranks"
    latency_us, bandwidth = measure_all_reduce(device, dist.new_group(backend=_backend(device)))
    neighbour_rate = measure_neighbour_bandwidth(world, [report.host for report in reports], device, timeout)
    local_report = replace(
        local_report,
        all_reduce_us=latency_us,
        all_reduce_gb_per_second=bandwidth,
        neighbour_gb_per_second=neighbour_rate,
    )
    return _all_gather(local_report)


def measure_clock_offset() -> float:
    """Measure the clock of this rank minus the clock of rank 0, by the shortest of a few round trips.

    Every rank must call this.
    """
    stamp = torch.zeros(1, dtype=torch.float64)
    if dist.get_rank() == 0:
        for peer in range(1, dist.get_world_size()):
            for _ in range(NUM_ROUND_TRIPS):
                dist.recv(stamp, peer)
                dist.send(stamp.fill_(time.time()), peer)
        return 0.0
    round_trips = []  # (seconds, clock offset)
    for _ in range(NUM_ROUND_TRIPS):
        sent_time = time.time()
        dist.send(stamp, 0)
        dist.recv(stamp, 0)
        received_time = time.time()
        round_trips.append((received_time - sent_time, (sent_time + received_time) / 2 - stamp.item()))
    return min(round_trips)[1]


def try_shared_file(
    directory: Path, timeout: PreflightTimeout, wait_seconds: float = 10
) -> tuple[bool | None, list[str]]:
    """Write a file on rank 0 and look for it on all ranks, to find out whether `directory` is shared.

    Return (whether this rank sees the file, problems). Every rank must call this.

    If rank 0 cannot write, the result is (None, [reason]) on rank 0 and (None, []) on the other ranks. The file is
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
        deadline = time.monotonic() + wait_seconds
        path = directory / f".dist-llm-check-{token}"
        while not (is_seen := _has_content(path, token)) and time.monotonic() < deadline:
            time.sleep(0.2)
        dist.barrier()
        return is_seen, []
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
    """Return the versions {software: version} that must be equal on all nodes; `none` or `unknown` if missing."""
    source_hash = hashlib.sha256(
        b"".join(file.read_bytes() for file in sorted(PACKAGE_DIRECTORY.rglob("*.py")))
    ).hexdigest()[:12]
    versions = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())) if dist.is_nccl_available() else "none",
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "none",
        "GPU": torch.cuda.get_device_name(device) if device.type == "cuda" else "none",
        "dist_llm": f"{__version__} (source {source_hash})",
        "the commit of dist_llm": _first_line("git", "rev-parse", "HEAD") or "unknown",
    }
    for package in ("deepspeed", "accelerate"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "none"
    return versions


def measure_matmul_tflops(device: torch.device) -> float:
    """Measure the best TFLOP/s of products of square matrices: bf16 on a GPU, fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.randn(size, size, device=device).to(dtype)
    best_rate, deadline = 0.0, time.perf_counter() + MATMUL_SECONDS
    while (start := time.perf_counter()) < deadline:
        matrix @ matrix
        _synchronize(device)
        best_rate = max(best_rate, 2 * size**3 / (time.perf_counter() - start))
    return best_rate / 1e12


def measure_all_reduce(device: torch.device, group: Any) -> tuple[float, float]:
    """Measure an all-reduce. Return the medians (latency of 4 bytes in us, bandwidth of a large tensor in GB/s).

    The bandwidth is bytes / seconds * 2 (p - 1) / p, the traffic of one link in a ring of p ranks; NaN for one rank.
    """
    num_ranks, num_bytes = dist.get_world_size(group), LARGE_BYTES[device.type]
    latency_seconds = _all_reduce_seconds(SMALL_BYTES, NUM_SMALL_REPETITIONS, device, group)
    seconds = _all_reduce_seconds(num_bytes, NUM_LARGE_REPETITIONS, device, group)
    if num_ranks == 1:
        return latency_seconds * 1e6, math.nan
    return latency_seconds * 1e6, num_bytes / seconds * 2 * (num_ranks - 1) / num_ranks / 1e9


def _all_reduce_seconds(num_bytes: int, repetitions: int, device: torch.device, group: Any) -> float:
    values = torch.zeros(num_bytes // 4, device=device)
    seconds = []
    for _ in range(NUM_WARMUPS + repetitions):
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[NUM_WARMUPS:])


def measure_neighbour_bandwidth(
    world: World, hosts: Sequence[str], device: torch.device, timeout: PreflightTimeout
) -> float:
    """Measure GB/s of an all-reduce over the ranks of this node and the next node; NaN on the last node.

    `hosts` are the node names by rank. Disjoint pairs of nodes run at the same time, so a hundred nodes take as long as
    three.
    """
    pairs, rate = list(pairwise(dict.fromkeys(hosts))), math.nan
    pairs = pairs[::2] + pairs[1::2]
    ranks_by_pair = [[rank for rank, host in enumerate(hosts) if host in pair] for pair in pairs]
    groups = [dist.new_group(ranks, backend=_backend(device)) for ranks in ranks_by_pair]
    for pair, group in zip(pairs, groups, strict=True):
        if world.host in pair:
            timeout.phase = f"the all-reduce of {pair[0]} and {pair[1]}"
            _, pair_rate = measure_all_reduce(device, group)
            rate = pair_rate if world.host == pair[0] else rate
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
    """Return the first line of the output of a program; an empty string if the program is missing or fails."""
    try:
        completed = subprocess.run(
            command, cwd=PACKAGE_DIRECTORY, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return completed.stdout.partition("\n")[0].strip()
