"""Run rows of `gpu.py` in child processes. A process that hangs is killed and one that dies is replaced.

A row's outcome is a dict: `outcome` is ok, failed, skipped or out of memory, and `error` gives the reason. A process in
which a row raised runs no other row, since a CUDA error may persist in the process. On a GPU a spare process with all
imports is ready to replace it, so that its start takes none of the time budget.
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
from gpu_context import Context, SkippedError
from gpu_rows import ROWS, Row

# Timings of rows other than training rows; a fake GPU has none.
TIMED = {"seconds", "ratio", "tflops", "chosen", "bytes_per_second", "copy", "of_copy"}
TIMED |= {"bf16_matmul", "fp32_matmul", "copy_bytes_per_second"}
PDEATHSIG = 1  # of linux/prctl.h
MAX_LEAKED_BYTES = 1 << 28  # if a row leaves more on the device, its process runs no other row
START_SECONDS = 150.0  # for a process to import everything, from a cold disk
GRACE_SECONDS = 2.0  # for a hung process to write its stacks
REPOSITORY = str(Path(__file__).resolve().parents[1])
Outcome = dict[str, Any]


def run_row(row: Row, context: Context) -> list[Outcome]:
    """Run a row in this process; an exception becomes its outcome."""
    try:
        outcomes = row.function(context, **row.options)
    except SkippedError as reason:
        return [{"outcome": "skipped", "error": str(reason)}]
    except torch.OutOfMemoryError as error:
        return [{"outcome": "out of memory", "error": str(error).split(". ")[0]}]
    except Exception:
        return [{"outcome": "failed", "error": traceback.format_exc().replace(REPOSITORY + "/", "")[-6000:]}]
    results = outcomes if isinstance(outcomes, list) else [outcomes]
    return [{"outcome": "failed" if result.get("broken") else "ok", **result} for result in results]


def run_on_fake_gpu(row: Row, context: Context) -> list[Outcome]:
    """Run a row on a new fake GPU and drop its timings, which mean nothing there."""
    with fake_gpu.activate() as active_gpu:
        outcomes = run_row(row, replace(context, fake_gpu=active_gpu))
    gc.collect()
    return [{name: value for name, value in outcome.items() if name not in TIMED} for outcome in outcomes]


class RowProcess:
    """A child process that runs rows, one at a time."""

    def __init__(self, context: Context) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = spawn.Pipe()
        self.stacks = context.folder / f".stacks-{os.getpid()}-{time.monotonic_ns()}"
        self.process = spawn.Process(target=_serve, args=(child_pipe, context, self.stacks), daemon=True)
        self.process.start()
        child_pipe.close()
        self.usable, self.ready = True, False

    def run(self, row: Row, seconds: float) -> list[Outcome]:
        """Return the row's outcomes, after at most so many seconds."""
        try:
            if not self._wait_ready(seconds):
                return [{"outcome": "failed", "error": "its process was still starting when time was up"}]
            self.pipe.send(row.name)
            if not self.pipe.poll(seconds):
                self.usable = False
                return [{"outcome": "failed", "error": f"cut off after {seconds:.0f} s\n{self._read_stacks()}"}]
            outcomes, self.usable = self.pipe.recv()
            return list(outcomes)
        except (EOFError, OSError):
            self.usable = False
            self.process.join(GRACE_SECONDS)
            return [{"outcome": "failed", "error": f"its process died, exit code {self.process.exitcode}"}]

    def _wait_ready(self, seconds: float) -> bool:
        """Wait until it has started or died, at most START_SECONDS, which do not count for the row."""
        if not self.ready:
            self.usable = self.ready = self.pipe.poll(max(seconds, START_SECONDS))
            if self.ready:
                self.pipe.recv()
        return self.ready

    def _read_stacks(self) -> str:
        """Return the stack of each of its threads."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(GRACE_SECONDS / 4)
        return self.stacks.read_text().replace(REPOSITORY + "/", "")[:6000]

    def close(self) -> None:
        """Kill it with all processes that it has started."""
        if self.process.pid is not None and self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                self.process.kill()  # it has no process group yet
        self.process.join()
        self.pipe.close()
        self.stacks.unlink(missing_ok=True)


class RowProcesses:
    """The process that runs the next row, and on a GPU a spare one."""

    def __init__(self, context: Context) -> None:
        self.context = context
        context.folder.mkdir(parents=True, exist_ok=True)
        self.active: RowProcess | None = None
        self.spare: RowProcess | None = None

    def run(self, row: Row, seconds: float) -> list[Outcome]:
        """Return the row's outcomes."""
        if self.active is None:
            self.active, self.spare = self.spare or RowProcess(self.context), None
        if self.spare is None and self.context.kind == "cuda":
            self.spare = RowProcess(self.context)
        outcomes = self.active.run(row, seconds)
        if not self.active.usable:
            self.active.close()
            self.active = None
        return outcomes

    def close(self) -> None:
        """Kill both processes."""
        for process in (self.active, self.spare):
            if process is not None:
                process.close()


def _serve(pipe: Connection, context: Context, stacks: Path) -> None:
    """Run the rows whose names arrive, until the pipe is closed: the child process."""
    os.setsid()
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    rows: dict[str, Row] = {row.name: row for row in ROWS}
    with stacks.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        pipe.send(None)
        while True:
            try:
                name = pipe.recv()
            except EOFError:
                return
            outcomes = run_row(rows[name], context)
            no_row_raised = all(result["outcome"] == "skipped" or "error" not in result for result in outcomes)
            pipe.send((outcomes, no_row_raised and _clean(context)))


def _clean(context: Context) -> bool:
    """Free the memory of the row, and return whether that worked."""
    torch._dynamo.reset()
    gc.collect()
    if context.kind != "cuda":
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
        prctl(PDEATHSIG, signal.SIGKILL)
