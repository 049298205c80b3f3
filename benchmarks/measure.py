"""Tools that benchmarks share: a device and its clock, peak memory, turns, worker processes, and limits.

The limits, with which figures are compared, are the rate of a matrix product and that of a copy.
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
STATUS = Path("/proc/self/status")
LONGEST_SECONDS = 2.0  # at most, for one product
T = TypeVar("T")


def any_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Time `work`, from an idle device to an idle device."""
    synchronize(device)
    start_time = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start_time


def take_turns(cases: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Return one result per case and round; all cases take a turn in each round, in reverse in every other one."""
    results: dict[str, list[T]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases) if number % 2 == 0 else reversed(list(cases)):
            results[name].append(cases[name]())
    return results


class Worker:
    """A process that takes turns, so that its peak memory is its own.

    There `make(*arguments)` returns the function that takes a turn. `workers` starts and ends workers.
    """

    def __init__(self, make: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_serve, args=(child_pipe, make, arguments), daemon=True)
        self.process.start()
        child_pipe.close()  # so that this process notices its death

    def wait(self) -> None:
        """Wait until the process is ready."""
        self.pipe.recv()

    def turn(self, *arguments: Any) -> Any:
        """Take one turn there and return its result; EOFError if the process died, which printed its traceback."""
        self.pipe.send(arguments)
        return self.pipe.recv()

    def close(self) -> None:
        """End the process, which sees the pipe close; kill it if it does not end, for example during a turn."""
        self.pipe.close()
        self.process.join(timeout=20)
        self.process.terminate()
        self.process.join()


@contextmanager
def workers(work: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Worker]]:
    """Run a worker for each (make, *arguments) during the block."""
    started: dict[str, Worker] = {}
    try:
        for name, (make, *arguments) in work.items():
            started[name] = Worker(make, *arguments)
        for worker in started.values():
            worker.wait()
        yield started
    finally:
        for worker in started.values():
            worker.close()


def _serve(pipe: Connection, make: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...]) -> None:
    turn = make(*arguments)
    pipe.send(None)
    with suppress(EOFError):
        while True:
            pipe.send(turn(*pipe.recv()))


class PeakMemory:
    """The peak memory in bytes since this was created.

    On a GPU, the memory that tensors allocate; on a CPU, this process's resident memory above its size at creation,
    which follows a first product that loads the libraries.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.ones(64, 64, device=device).mm(torch.ones(64, 64, device=device))
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.before = resident("VmRSS")
        if STATUS.exists():
            Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resident("VmHWM") - self.before


def resident(name: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes; without /proc, the peak since its start for both."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(next(line for line in STATUS.read_text().splitlines() if line.startswith(name)).split()[1]) * 1024


class ResourceUsage:
    """The resources that this process has used since creation: CPU seconds, the system's share of them, page faults."""

    def __init__(self) -> None:
        self.before = resource.getrusage(resource.RUSAGE_SELF)

    def elapsed(self) -> dict[str, float]:
        now = resource.getrusage(resource.RUSAGE_SELF)
        user, system = now.ru_utime - self.before.ru_utime, now.ru_stime - self.before.ru_stime
        faults = now.ru_minflt - self.before.ru_minflt
        return {"cpu_seconds": user + system, "system": system / max(user + system, 1e-9), "faults": faults}


def matmul_rate(device: torch.device, precision: str, size: int = 0, tries: int = 3) -> float:
    """Return FLOP/s of a product of two square matrices with all threads: the best of a few tries, after a warm-up."""
    if not size:
        size, min_rate = 8192 if device.type == "cuda" else 2048, matmul_rate(device, precision, 256, 1)
        while 2 * size**3 / min_rate > LONGEST_SECONDS:  # a CPU without bf16 has a hundredth of its rate in fp32
            size //= 2
    left = torch.randn(size, size, device=device).to(DTYPES[precision])
    return 2 * size**3 / min([seconds(lambda: left @ left, device) for _ in range(tries + 1)][1:])


def precisions(requested: Sequence[str] | None, device: torch.device) -> list[str]:
    """Return the requested precisions; by default fp32 and bf16, but not bf16 on a CPU that would take hours."""
    if requested:
        return list(requested)
    fp32, bf16 = (matmul_rate(device, precision, 256, 1) for precision in ("fp32", "bf16"))
    if bf16 > fp32 / 10:
        return ["fp32", "bf16"]
    rates = f"{bf16 / 1e9:.1f} GFLOP/s, in fp32 at {fp32 / 1e9:.0f}"
    print(f"bf16 is left out: products in it run at {rates} here; --precision bf16 asks for it", file=sys.stderr)
    return ["fp32"]


def copy_rate(device: torch.device, size: int, tries: int = 3) -> float:
    """Return the bytes read and written per second in a copy of `size` bytes, the best of a few tries."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min([seconds(lambda: target.copy_(source), device) for _ in range(tries + 1)][1:])


def cpu_name() -> str:
    """Return the system's name of the processor."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0].partition(":")[2].strip() if names else "unknown"


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
