"""Run the cases of `gpu.py` in child processes: a process that hangs is killed, and a process that dies is replaced.

The outcome of a case is a dict: `outcome` is ok, failed, skipped or out of memory, and `error` gives the reason. After
a case has raised, its process runs no other case, since a CUDA error may persist in the process. On a GPU a spare
process with all imports is ready to replace it. The start of the spare process takes none of the time budget.
"""

import ctypes
import faulthandler
import gc
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import fake_gpu
from gpu_cases import CASES, BenchmarkCase
from gpu_context import CaseContext, SkippedError

# Keys of an outcome that depend on time; they mean nothing on a fake GPU. Training cases report none there.
TIMED_KEYS = {"seconds", "ratio", "tflops", "chosen", "bytes_per_second", "copy", "of_copy"}
TIMED_KEYS |= {"bf16_matmul", "fp32_matmul", "copy_bytes_per_second"}
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
MAX_LEAKED_BYTES = 1 << 28  # if a case leaves more allocated on the device, its process runs no other case
START_TIMEOUT_SECONDS = 150.0  # for a process to import everything, from a cold disk
GRACE_SECONDS = 2.0  # for a hung process to write its stacks, and for a dead process to report its exit code
REPOSITORY = str(Path(__file__).resolve().parents[1])
Outcome = dict[str, Any]


def run_case(case: BenchmarkCase, context: CaseContext) -> list[Outcome]:
    """Run a case in this process; an exception becomes its outcome."""
    try:
        results = case.function(context, **case.options)
    except SkippedError as reason:
        return [{"outcome": "skipped", "error": str(reason)}]
    except torch.OutOfMemoryError as error:
        return [{"outcome": "out of memory", "error": str(error).split(". ")[0]}]
    except Exception:
        return [{"outcome": "failed", "error": traceback.format_exc().replace(REPOSITORY + "/", "")[-6000:]}]
    results = results if isinstance(results, list) else [results]
    return [{"outcome": "failed" if result.get("broken") else "ok", **result} for result in results]


def run_on_fake_gpu(case: BenchmarkCase, context: CaseContext) -> list[Outcome]:
    """Run a case on a new fake GPU and drop its timings, which mean nothing there."""
    with fake_gpu.activate() as active_gpu:
        outcomes = run_case(case, replace(context, active_fake_gpu=active_gpu))
    gc.collect()
    return [{key: value for key, value in outcome.items() if key not in TIMED_KEYS} for outcome in outcomes]


class CaseProcess:
    """A child process that runs cases, one at a time.

    `is_ready` is set when the process has finished its imports, and `is_usable` is cleared when it must be replaced.
    """

    def __init__(self, context: CaseContext) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = spawn.Pipe()
        self.stacks_path = context.folder / f".stacks-{os.getpid()}-{time.monotonic_ns()}"
        self.process = spawn.Process(target=_serve, args=(child_pipe, context, self.stacks_path), daemon=True)
        self.process.start()
        child_pipe.close()
        self.is_usable, self.is_ready = True, False

    def run(self, case: BenchmarkCase, timeout_seconds: float) -> list[Outcome]:
        """Return the outcomes of a case; a case that runs longer than the timeout has failed."""
        try:
            if not self._wait_ready(timeout_seconds):
                return [{"outcome": "failed", "error": "its process was still starting when time was up"}]
            self.pipe.send(case.name)
            if not self.pipe.poll(timeout_seconds):
                self.is_usable = False
                return [{"outcome": "failed", "error": f"cut off after {timeout_seconds:.0f} s\n{self._read_stacks()}"}]
            outcomes, self.is_usable = self.pipe.recv()
            return list(outcomes)
        except (EOFError, OSError):
            self.is_usable = False
            self.process.join(GRACE_SECONDS)
            return [{"outcome": "failed", "error": f"its process died, exit code {self.process.exitcode}"}]

    def _wait_ready(self, timeout_seconds: float) -> bool:
        """Wait until the process has started or died, for START_TIMEOUT_SECONDS or the timeout if that is longer.

        The time of the start does not count for the case.
        """
        if not self.is_ready:
            self.is_usable = self.is_ready = self.pipe.poll(max(timeout_seconds, START_TIMEOUT_SECONDS))
            if self.is_ready:
                self.pipe.recv()
        return self.is_ready

    def _read_stacks(self) -> str:
        """Return the stacks of all threads of the process."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(GRACE_SECONDS / 4)
        return self.stacks_path.read_text().replace(REPOSITORY + "/", "")[:6000]

    def close(self) -> None:
        """Kill the process and all processes that it has started."""
        if self.process.pid is not None and self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                self.process.kill()  # the process has not called setsid yet
        self.process.join()
        self.pipe.close()
        self.stacks_path.unlink(missing_ok=True)


class CaseProcesses:
    """The process that runs the next case, and on a GPU a spare process."""

    def __init__(self, context: CaseContext) -> None:
        self.context = context
        context.folder.mkdir(parents=True, exist_ok=True)
        self.active: CaseProcess | None = None
        self.spare: CaseProcess | None = None

    def run(self, case: BenchmarkCase, timeout_seconds: float) -> list[Outcome]:
        """Run a case and return its outcomes; replace the process if it is no longer usable."""
        if self.active is None:
            self.active, self.spare = self.spare or CaseProcess(self.context), None
        if self.spare is None and self.context.device_kind == "cuda":
            self.spare = CaseProcess(self.context)
        outcomes = self.active.run(case, timeout_seconds)
        if not self.active.is_usable:
            self.active.close()
            self.active = None
        return outcomes

    def close(self) -> None:
        """Kill both processes."""
        for process in (self.active, self.spare):
            if process is not None:
                process.close()


def _serve(pipe: Connection, context: CaseContext, stacks_path: Path) -> None:
    """In the child process: run the cases whose names arrive, until the pipe is closed."""
    os.setsid()
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Ctrl-C the parent ends this process
    cases_by_name: dict[str, BenchmarkCase] = {case.name: case for case in CASES}
    with stacks_path.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        pipe.send(None)
        while True:
            try:
                name = pipe.recv()
            except EOFError:
                return
            outcomes = run_case(cases_by_name[name], context)
            has_raised = any(outcome["outcome"] != "skipped" and "error" in outcome for outcome in outcomes)
            is_usable = not has_raised and _free_memory(context)
            pipe.send((outcomes, is_usable))


def _free_memory(context: CaseContext) -> bool:
    """Free the memory of the case; return whether at most MAX_LEAKED_BYTES remain allocated."""
    torch._dynamo.reset()
    gc.collect()
    if context.device_kind != "cuda":
        return True
    try:
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated() < MAX_LEAKED_BYTES
    except RuntimeError:
        return False


def die_with_parent() -> None:
    """Let Linux kill this process when its parent has ended."""
    prctl: Callable[..., int] | None = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
