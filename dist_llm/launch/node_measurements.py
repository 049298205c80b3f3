"""What a rank measures in preflight: clock, software versions, matrix products and all-reduces. It prints nothing."""

import hashlib
import math
import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dist_llm import __version__

MATMUL_SECONDS = 0.5  # duration of the matmul measurement


NUM_ROUND_TRIPS = 5  # of the clock measurement


# All-reduces: not measured, measured with few bytes (latency), measured with many bytes (bandwidth).
NUM_WARMUPS, NUM_SMALL_REPETITIONS, NUM_LARGE_REPETITIONS = 3, 20, 5


SMALL_BYTES, LARGE_BYTES = 4, {"cpu": 8 * 2**20, "cuda": 64 * 2**20}  # by device type


PACKAGE_DIRECTORY = Path(__file__).parents[1]


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


def measure_free_gib(directory: Path) -> float:
    """Return the free space of the file system of `directory`; NaN if it cannot be read."""
    try:
        return shutil.disk_usage(directory).free / 2**30
    except OSError:
        return math.nan


def collect_versions(device: torch.device) -> dict[str, str]:
    """Return the versions {software: version} that must be equal on all nodes; `none` or `unknown` if missing."""
    # Without a git checkout, the hash of the source files shows whether all nodes run the same code.
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
    # The sizes fill the device, and a product takes milliseconds.
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    matrix = torch.randn(size, size, device=device).to(dtype)
    best_rate, deadline = 0.0, time.perf_counter() + MATMUL_SECONDS
    while (start := time.perf_counter()) < deadline:
        matrix @ matrix
        _synchronize(device)
        best_rate = max(best_rate, 2 * size**3 / (time.perf_counter() - start))
    return best_rate / 1e12


class AllReduceRates(NamedTuple):
    """Medians over several all-reduces of a process group."""

    latency_us: float  # of a tensor of SMALL_BYTES
    # Of a tensor of LARGE_BYTES: bytes / seconds * 2 (p - 1) / p, the traffic of one link in a ring of p ranks. NaN for
    # one rank.
    gb_per_second: float


def measure_all_reduce(device: torch.device, group: Any) -> AllReduceRates:
    """Measure the all-reduce of tensors on `device`. Every rank of the group must call this."""
    num_ranks, num_bytes = dist.get_world_size(group), LARGE_BYTES[device.type]
    latency_seconds = _measure_all_reduce_seconds(SMALL_BYTES, NUM_SMALL_REPETITIONS, device, group)
    seconds = _measure_all_reduce_seconds(num_bytes, NUM_LARGE_REPETITIONS, device, group)
    if num_ranks == 1:
        return AllReduceRates(latency_seconds * 1e6, math.nan)
    return AllReduceRates(latency_seconds * 1e6, num_bytes / seconds * 2 * (num_ranks - 1) / num_ranks / 1e9)


def _measure_all_reduce_seconds(num_bytes: int, num_repetitions: int, device: torch.device, group: Any) -> float:
    """Return the median duration of an all-reduce of `num_bytes` bytes of fp32."""
    values = torch.zeros(num_bytes // 4, device=device)
    seconds = []
    for _ in range(NUM_WARMUPS + num_repetitions):
        start = time.perf_counter()
        dist.all_reduce(values, group=group)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[NUM_WARMUPS:])


def select_backend(device: torch.device) -> str:
    """Return the backend of a process group for tensors on `device`."""
    return "nccl" if device.type == "cuda" else "gloo"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _first_line(*command: str) -> str:
    """Return the first line of the output of a program; an empty string if the program is missing or fails."""
    try:
        completed = subprocess.run(
            command, cwd=PACKAGE_DIRECTORY, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return completed.stdout.partition("\n")[0].strip()
