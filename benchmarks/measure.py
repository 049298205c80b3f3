"""What the programs here share: a device and its clock, peak memory, turns, work in processes of its own, and the
limits that figures are held against: the rate of a matrix product and that of a copy."""

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
LONGEST_SECONDS = 2.0  # of one product
T = TypeVar("T")


def any_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def settle(device: torch.device) -> None:
    """Wait for all that was given to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """What `work` takes, from an idle device to an idle device."""
    settle(device)
    begin = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - begin


def take_turns(cases: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """One result per case and round. All cases have a turn in each round; every other one goes backwards."""
    found: dict[str, list[T]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in list(cases) if number % 2 == 0 else reversed(list(cases)):
            found[name].append(cases[name]())
    return found


class Worker:
    """Work in a process of its own, so that its peak of memory is its own, which waits for its turns.

    `make(*arguments)` builds it there and returns what a turn is. `workers` starts and ends them.
    """

    def __init__(self, make: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that its death is seen here

    def wait(self) -> None:
        """Until it is built."""
        self.pipe.recv()

    def turn(self, *arguments: Any) -> Any:
        """Have one turn there; what it returned. EOFError where the process has died: its traceback was printed."""
        self.pipe.send(arguments)
        return self.pipe.recv()

    def close(self) -> None:
        """End the process, which sees the pipe closed; where it does not, as in the midst of a turn, by force."""
        self.pipe.close()
        self.process.join(timeout=20)
        self.process.terminate()
        self.process.join()


@contextmanager
def workers(work: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Worker]]:
    """A worker of each (make, *arguments), for the time of the block."""
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
    """The most memory in use since this was made, in bytes: on a GPU allocated by tensors; on a CPU resident in this
    process, above what was resident then, after a first product has brought in the libraries."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        torch.ones(64, 64, device=device).mm(torch.ones(64, 64, device=device))
        settle(device)
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
    """VmRSS or VmHWM of this process, in bytes. Where there is no /proc, the highest since its start for both."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(next(line for line in STATUS.read_text().splitlines() if line.startswith(name)).split()[1]) * 1024


class Strain:
    """What this process has had since this was made: seconds of CPU, the system's share of them, page faults."""

    def __init__(self) -> None:
        self.before = resource.getrusage(resource.RUSAGE_SELF)

    def taken(self) -> dict[str, float]:
        now = resource.getrusage(resource.RUSAGE_SELF)
        user, system = now.ru_utime - self.before.ru_utime, now.ru_stime - self.before.ru_stime
        faults = now.ru_minflt - self.before.ru_minflt
        return {"cpu_seconds": user + system, "system": system / max(user + system, 1e-9), "faults": faults}


def matmul_rate(device: torch.device, precision: str, size: int = 0, tries: int = 3) -> float:
    """FLOP/s of a product of two square matrices, with all threads: the best of a few tries, after one to warm up."""
    if not size:
        size, least = 8192 if device.type == "cuda" else 2048, matmul_rate(device, precision, 256, 1)
        while 2 * size**3 / least > LONGEST_SECONDS:  # a CPU without bf16 has a hundredth of its rate in fp32
            size //= 2
    left = torch.randn(size, size, device=device).to(DTYPES[precision])
    return 2 * size**3 / min([seconds(lambda: left @ left, device) for _ in range(tries + 1)][1:])


def precisions(asked: Sequence[str] | None, device: torch.device) -> list[str]:
    """Those asked for; else fp32 and bf16, but bf16 on a CPU that has none and would take hours. It says so."""
    if asked:
        return list(asked)
    fp32, bf16 = (matmul_rate(device, precision, 256, 1) for precision in ("fp32", "bf16"))
    if bf16 > fp32 / 10:
        return ["fp32", "bf16"]
    rates = f"{bf16 / 1e9:.1f} GFLOP/s, in fp32 at {fp32 / 1e9:.0f}"
    print(f"bf16 is left out: products in it run at {rates} here; --precision bf16 asks for it", file=sys.stderr)
    return ["fp32"]


def copy_rate(device: torch.device, size: int, tries: int = 3) -> float:
    """Bytes read and written per second by a plain copy of `size` bytes, the best of a few tries."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min([seconds(lambda: target.copy_(source), device) for _ in range(tries + 1)][1:])


def cpu_name() -> str:
    """The processor as the system calls it."""
    path = Path("/proc/cpuinfo")
    names = [line for line in path.read_text().splitlines() if line.startswith("model name")] if path.exists() else []
    return names[0].partition(":")[2].strip() if names else "unknown"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
