"""Measuring tools that benchmarks share: a clock, peak memory, turns, worker processes, and the limits of a device.

A turn is one measurement of one case. Cases take turns, so that a change in the speed of the machine affects all cases
alike. The limits of a device, with which figures are compared, are its rates of a matrix product and of a copy.
"""

import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STATUS_FILE = Path("/proc/self/status")
MAX_MATMUL_SECONDS = 2.0  # the matrix product is made smaller if one would take longer
T = TypeVar("T")


def choose_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call of `work`; the device is idle before and after."""
    synchronize(device)
    start_time = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start_time


def take_turns(cases: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Run each case once per round and return {case: one result per round}; odd rounds run in reverse order."""
    results: dict[str, list[T]] = {name: [] for name in cases}
    for round_index in range(rounds):
        for name in list(cases) if round_index % 2 == 0 else reversed(list(cases)):
            results[name].append(cases[name]())
    return results


class Worker:
    """A process for the turns of one case, so that its peak memory excludes that of other cases.

    In the process, `make_turn(*arguments)` returns the function that takes a turn. `start_workers` starts and ends
    workers.
    """

    def __init__(self, make_turn: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_pipe, make_turn, arguments), daemon=True)
        self.process.start()
        child_pipe.close()  # so that `recv` raises EOFError if the process dies

    def wait(self) -> None:
        """Wait until the process is ready."""
        self.pipe.recv()

    def take_turn(self, *arguments: Any) -> Any:
        """Take one turn in the process and return its result; raises EOFError if the process died."""
        self.pipe.send(arguments)
        return self.pipe.recv()

    def close(self) -> None:
        """Close the pipe, which ends the process; kill the process if it is still in a turn after 20 s."""
        self.pipe.close()
        self.process.join(timeout=20)
        self.process.terminate()
        self.process.join()


@contextmanager
def start_workers(cases: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Worker]]:
    """Start a worker for each case (make_turn, *arguments) and end the workers after the block."""
    workers_by_case: dict[str, Worker] = {}
    try:
        for name, (make_turn, *arguments) in cases.items():
            workers_by_case[name] = Worker(make_turn, *arguments)
        for worker in workers_by_case.values():
            worker.wait()
        yield workers_by_case
    finally:
        for worker in workers_by_case.values():
            worker.close()


def _serve(pipe: Connection, make_turn: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    """In a worker process: prepare, then take a turn for each message of the pipe until the pipe closes."""
    take_turn = make_turn(*arguments)
    pipe.send(None)
    with suppress(EOFError):
        while True:
            pipe.send(take_turn(*pipe.recv()))


class PeakMemory:
    """Measures the peak memory of this process in bytes since creation.

    On a GPU the peak is the memory that tensors allocate. On a CPU it is the growth of the resident memory. Creation
    first computes a small matrix product, which loads the libraries.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.ones(64, 64, device=device).mm(torch.ones(64, 64, device=device))
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.bytes_before = read_resident_bytes("VmRSS")
        if STATUS_FILE.exists():
            Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM, the peak of the resident memory

    def read_bytes(self) -> int:
        """Return the peak in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return read_resident_bytes("VmHWM") - self.bytes_before


def read_resident_bytes(field: str) -> int:
    """Return VmRSS (resident memory) or VmHWM (its peak) of this process in bytes; without /proc, always the peak."""
    if not STATUS_FILE.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(next(line for line in STATUS_FILE.read_text().splitlines() if line.startswith(field)).split()[1]) * 1024


class ResourceUsage:
    """Measures the CPU time and the page faults of this process since creation."""

    def __init__(self) -> None:
        self.usage_before = resource.getrusage(resource.RUSAGE_SELF)

    def read(self) -> dict[str, float]:
        """Return `cpu_seconds`, the fraction of them that the `system` used, and the number of page `faults`."""
        usage, before = resource.getrusage(resource.RUSAGE_SELF), self.usage_before
        user_seconds, system_seconds = usage.ru_utime - before.ru_utime, usage.ru_stime - before.ru_stime
        cpu_seconds = user_seconds + system_seconds
        faults = usage.ru_minflt - before.ru_minflt
        return {"cpu_seconds": cpu_seconds, "system": system_seconds / max(cpu_seconds, 1e-9), "faults": faults}


def measure_matmul_rate(device: torch.device, precision: str, size: int = 0, tries: int = 3) -> float:
    """Return FLOP/s of a product of two square matrices of `size` rows with all threads, the best of some tries.

    The first product is a warm-up. By default the size fits the device: 8192 on a GPU, at most 2048 on a CPU.
    """
    if not size:
        size = 8192 if device.type == "cuda" else 2048
        estimated_rate = measure_matmul_rate(device, precision, size=256, tries=1)
        # On a CPU without bf16 instructions, bf16 has about a hundredth of the rate of fp32.
        while 2 * size**3 / estimated_rate > MAX_MATMUL_SECONDS:
            size //= 2
    matrix = torch.randn(size, size, device=device).to(DTYPES[precision])
    return 2 * size**3 / min([measure_seconds(lambda: matrix @ matrix, device) for _ in range(tries + 1)][1:])


def choose_precisions(requested: Sequence[str] | None, device: torch.device) -> list[str]:
    """Return the requested precisions; by default fp32 and bf16, without bf16 on a CPU that lacks bf16 instructions."""
    if requested:
        return list(requested)
    fp32_rate, bf16_rate = (measure_matmul_rate(device, precision, size=256, tries=1) for precision in ("fp32", "bf16"))
    if bf16_rate > fp32_rate / 10:
        return ["fp32", "bf16"]
    rates = f"{bf16_rate / 1e9:.1f} GFLOP/s, fp32 products at {fp32_rate / 1e9:.0f} GFLOP/s"
    print(f"bf16 is left out: its matrix products run at {rates}. To measure it, add --precision bf16", file=sys.stderr)
    return ["fp32"]


def measure_copy_rate(device: torch.device, num_bytes: int, tries: int = 3) -> float:
    """Return the bytes read plus written per second in a copy of `num_bytes`, the best of some tries."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return (
        2 * source.nbytes / min([measure_seconds(lambda: target.copy_(source), device) for _ in range(tries + 1)][1:])
    )


def read_cpu_name() -> str:
    """Return the name of the processor."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0].partition(":")[2].strip() if names else "unknown"


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
