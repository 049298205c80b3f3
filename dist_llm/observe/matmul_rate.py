"""The rate that a device reaches in matrix products: measured at several sizes, the best of several starts kept.

A busy machine gives too low a rate, and never too high a one. So the best rate of the first `ENOUGH` starts is kept in
a file per user, by machine, device, dtype and number of threads, and later starts do not measure again.
"""

import json
import logging
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from dist_llm.config.schema import CACHE

log = logging.getLogger("dist_llm")

FILE = Path(CACHE) / "matmul_rates.json"
ENOUGH = 5
SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}  # of square matrices
SECONDS = 0.6  # for all sizes together


def matmul_rate(device: torch.device, dtype: torch.dtype, file: Path | None = None) -> float:
    """FLOP/s: the best that was measured on this machine, now or before."""
    file = (file or FILE).expanduser()
    key = " | ".join((platform.node(), _device_name(device), str(dtype), f"{torch.get_num_threads()} threads"))
    kept = _read(file)
    entry = kept.get(key, {"rate": 0.0, "starts": 0})
    if entry["starts"] >= ENOUGH:
        return float(entry["rate"])
    rate = max(measure_matmul_rate(device, dtype), float(entry["rate"]))
    _write(file, {**kept, key: {"rate": rate, "starts": entry["starts"] + 1}})
    return rate


def measure_matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s: the best of repeated square products, the small ones first, until the time is over."""
    best, sizes = 0.0, SIZES[device.type]
    for number, size in enumerate(sizes, 1):
        left = torch.randn(size, size, device=device).to(dtype)
        end = time.perf_counter() + SECONDS / len(sizes)
        seconds = [_product_seconds(left, device) for _ in range(2)]  # the first also starts the libraries
        while time.perf_counter() < end:
            seconds.append(_product_seconds(left, device))
        best = max(best, 2 * size**3 / min(seconds))
        if number < len(sizes) and 8 * min(seconds) > SECONDS:
            break  # a CPU without bf16 has a hundredth of its rate in fp32
    return best


def _product_seconds(left: torch.Tensor, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    left @ left
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


def _read(file: Path) -> dict[str, Any]:
    try:
        kept = json.loads(file.read_text())
        return {key: each for key, each in kept.items() if isinstance(each["rate"], float) and each["starts"] > 0}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}  # none yet, or not one of ours: measured anew


def _write(file: Path, kept: dict[str, Any]) -> None:
    """Ranks and runs may write at once: the last one wins, and each file is whole."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(kept, indent=1) + "\n")
        temporary.replace(file)
    except OSError as error:
        log.debug("the matmul rate is not kept: %s", error)
