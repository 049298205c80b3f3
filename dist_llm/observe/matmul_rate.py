"""Measure the matmul rate (FLOP/s of matrix products) of a device, and cache the best of several measurements.

Other load on the machine lowers a measurement and never raises it. The first NUM_MEASUREMENTS calls measure, and a
cache file of the user stores the best rate per machine, device, dtype and number of threads. Later calls read the file.
"""

import json
import logging
import platform
import time
from pathlib import Path
from typing import Any

import torch

from dist_llm.config.data_sections import CACHE
from dist_llm.io.atomic import replace_file

log = logging.getLogger("dist_llm")

CACHE_FILE = Path(CACHE) / "matmul_rates.json"
NUM_MEASUREMENTS = 5  # calls that measure; later calls read the cache
COUNT_KEY = "starts"  # of an entry of the cache: the number of calls that have measured
MATRIX_SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}  # rows of square matrices, by device type
MEASURE_SECONDS = 0.6  # time for all sizes together


def get_matmul_rate(device: torch.device, dtype: torch.dtype, cache_file: Path | None = None) -> float:
    """Return the best FLOP/s that this call or an earlier one measured on this machine, and store it."""
    cache_file = (cache_file or CACHE_FILE).expanduser()
    key = " | ".join((platform.node(), _device_name(device), str(dtype), f"{torch.get_num_threads()} threads"))
    cache = _read_cache(cache_file)
    entry = cache.get(key, {"rate": 0.0, COUNT_KEY: 0})
    if entry[COUNT_KEY] >= NUM_MEASUREMENTS:
        return float(entry["rate"])
    rate = max(measure_matmul_rate(device, dtype), float(entry["rate"]))
    _write_cache(cache_file, {**cache, key: {"rate": rate, COUNT_KEY: entry[COUNT_KEY] + 1}})
    return rate


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best FLOP/s of repeated products of square matrices within MEASURE_SECONDS, small sizes first."""
    best_rate, sizes = 0.0, MATRIX_SIZES[device.type]
    for size in sizes:
        matrix = torch.randn(size, size, device=device).to(dtype)
        deadline = time.perf_counter() + MEASURE_SECONDS / len(sizes)
        seconds = [_matmul_seconds(matrix, device) for _ in range(2)]  # the first call also initializes libraries
        while time.perf_counter() < deadline:
            seconds.append(_matmul_seconds(matrix, device))
        best_rate = max(best_rate, 2 * size**3 / min(seconds))
        if size != sizes[-1] and 8 * min(seconds) > MEASURE_SECONDS:
            break  # the next size takes too long: bf16 on a CPU that emulates it
    return best_rate


def _matmul_seconds(matrix: torch.Tensor, device: torch.device) -> float:
    """Return the duration of the product of a square matrix with itself."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    matrix @ matrix
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


def _read_cache(cache_file: Path) -> dict[str, Any]:
    try:
        cache = json.loads(cache_file.read_text())
        return {key: entry for key, entry in cache.items() if isinstance(entry["rate"], float) and entry[COUNT_KEY] > 0}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # there is no cache yet, or it is damaged: measure again


def _write_cache(cache_file: Path, cache: dict[str, Any]) -> None:
    """Replace the cache file atomically. If several processes write, the last one wins."""
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(cache_file, json.dumps(cache, indent=1).encode() + b"\n", shared=True)
    except OSError as error:
        log.debug("cannot cache the matmul rate: %s", error)
