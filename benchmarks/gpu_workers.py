"""Rows of `gpu.py` in child processes: one that hangs is killed, one that dies is replaced, and the run goes on.

A row's outcome is a dict: `outcome` is ok, failed, skipped or out of memory, and `error` says why. A process in which
a row raised takes no other row, since an error of CUDA may outlive the row that met it. On a GPU a spare process, which
has imported everything, waits for that: then a start costs no time of the budget.
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

import pretend
from gpu_context import Context, SkippedError
from gpu_rows import ROWS, Row

# What rows measure, beside a training row's figures, which a pretended GPU has none of.
TIMED = {"seconds", "ratio", "tflops", "chosen", "bytes_per_second", "copy", "of_copy"}
TIMED |= {"bf16_matmul", "fp32_matmul", "copy_bytes_per_second"}
PDEATHSIG = 1  # of linux/prctl.h
LEFT_BYTES = 1 << 28  # more than that left on the device by a row: its process takes no other row
START_SECONDS = 150.0  # for a process to import everything, from a cold disk
GRACE_SECONDS = 2.0  # for a hung process to write where it is
REPOSITORY = str(Path(__file__).resolve().parents[1])
Outcome = dict[str, Any]


def run_row(row: Row, context: Context) -> list[Outcome]:
    """Run a row in this process; all that it raises becomes its outcome."""
    try:
        found = row.work(context, **row.options)
    except SkippedError as reason:
        return [{"outcome": "skipped", "error": str(reason)}]
    except torch.OutOfMemoryError as error:
        return [{"outcome": "out of memory", "error": str(error).split(". ")[0]}]
    except Exception:
        return [{"outcome": "failed", "error": traceback.format_exc().replace(REPOSITORY + "/", "")[-6000:]}]
    results = found if isinstance(found, list) else [found]
    return [{"outcome": "failed" if each.get("broken") else "ok", **each} for each in results]


def run_pretended(row: Row, context: Context) -> list[Outcome]:
    """The same on a pretended GPU, made anew for each row, without what was timed there: that means nothing."""
    with pretend.gpu() as gpu:
        found = run_row(row, replace(context, gpu=gpu))
    gc.collect()
    return [{name: value for name, value in each.items() if name not in TIMED} for each in found]


class RowProcess:
    """A child process that runs rows, one at a time."""

    def __init__(self, context: Context) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, theirs = spawn.Pipe()
        self.stacks = context.folder / f".stacks-{os.getpid()}-{time.monotonic_ns()}"
        self.process = spawn.Process(target=_serve, args=(theirs, context, self.stacks), daemon=True)
        self.process.start()
        theirs.close()
        self.usable, self.ready = True, False

    def run(self, row: Row, seconds: float) -> list[Outcome]:
        """The row's outcomes, after at most so many seconds."""
        try:
            if not self._wait_ready(seconds):
                return [{"outcome": "failed", "error": "its process was still starting when time was up"}]
            self.pipe.send(row.name)
            if not self.pipe.poll(seconds):
                self.usable = False
                return [{"outcome": "failed", "error": f"cut off after {seconds:.0f} s\n{self._interrupted()}"}]
            found, self.usable = self.pipe.recv()
            return list(found)
        except (EOFError, OSError):
            self.usable = False
            self.process.join(GRACE_SECONDS)
            return [{"outcome": "failed", "error": f"its process died, exit code {self.process.exitcode}"}]

    def _wait_ready(self, seconds: float) -> bool:
        """Whether it has started, after at most START_SECONDS, which are not the row's; a dead one is no less ready."""
        if not self.ready:
            self.usable = self.ready = self.pipe.poll(max(seconds, START_SECONDS))
            if self.ready:
                self.pipe.recv()
        return self.ready

    def _interrupted(self) -> str:
        """Where each of its threads is."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(GRACE_SECONDS / 4)
        return self.stacks.read_text().replace(REPOSITORY + "/", "")[:6000]

    def close(self) -> None:
        """Kill it, with all that it has started."""
        if self.process.pid is not None and self.process.is_alive():
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                self.process.kill()  # it has no group yet
        self.process.join()
        self.pipe.close()
        self.stacks.unlink(missing_ok=True)


class RowProcesses:
    """The process that runs the next row, and a spare one where a GPU waits for it."""

    def __init__(self, context: Context) -> None:
        self.context = context
        context.folder.mkdir(parents=True, exist_ok=True)
        self.active: RowProcess | None = None
        self.spare: RowProcess | None = None

    def run(self, row: Row, seconds: float) -> list[Outcome]:
        """The row's outcomes."""
        if self.active is None:
            self.active, self.spare = self.spare or RowProcess(self.context), None
        if self.spare is None and self.context.kind == "cuda":
            self.spare = RowProcess(self.context)
        found = self.active.run(row, seconds)
        if not self.active.usable:
            self.active.close()
            self.active = None
        return found

    def close(self) -> None:
        """End both."""
        for each in (self.active, self.spare):
            if each is not None:
                each.close()


def _serve(pipe: Connection, context: Context, stacks: Path) -> None:
    """The child: run the rows whose names come, until the pipe is closed."""
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
            found = run_row(rows[name], context)
            usable = all(each["outcome"] == "skipped" or "error" not in each for each in found) and _clean(context)
            pipe.send((found, usable))


def _clean(context: Context) -> bool:
    """Free what the row has left; whether that worked."""
    torch._dynamo.reset()
    gc.collect()
    if context.kind != "cuda":
        return True
    try:
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated() < LEFT_BYTES
    except RuntimeError:
        return False


def die_with_parent() -> None:
    """On Linux: this process is killed when the one that started it is gone."""
    prctl: Callable[..., int] | None = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(PDEATHSIG, signal.SIGKILL)
