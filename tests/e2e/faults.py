"""Start training with a fault, and wait until all of its processes have ended.

    process = start_with_fault(Fault("raise", rank=1, step=4), corpus, tmp_path, "parallel.dp_shard=2", ranks=2)
    exit_code, output, remaining_pids = wait_for_end(process, timeout_seconds=60)

run_with_fault.py, the program that is started, lists the faults.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from . import commands

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
MODULE = "tests.e2e.run_with_fault"


@dataclass(frozen=True)
class Fault:
    """A fault before a step of one rank. Steps count from 1.

    Two faults in sequence are written as Fault("nan+usr1", rank=0, step="12+10"): nan before step 12, then usr1 before
    step 10.
    """

    name: str
    rank: int
    step: int | str

    @property
    def arguments(self) -> tuple[str, str, str]:
        """The arguments of run_with_fault.py."""
        return self.name, str(self.rank), str(self.step)


NO_FAULT = Fault("none", rank=0, step=0)


class EndedProcess(NamedTuple):
    """What `wait_for_end` returns. `remaining_pids` are the descendants that still ran, and that it killed."""

    exit_code: int
    output: str
    remaining_pids: list[int]


def make_arguments(fault: Fault, corpus: Path, *overrides: object) -> list[str]:
    """Return the arguments of run_with_fault.py that train 20 steps of the tiny model."""
    return [*fault.arguments, *map(str, commands.make_train_arguments(corpus, "run.steps=20", *overrides))]


def train_with_fault(fault: Fault, corpus: Path, cwd: Path, *overrides: object, ranks: int = 0) -> str:
    """Train to the end and return stdout and stderr. A non-zero exit code fails the test."""
    completed = commands.run(*make_arguments(fault, corpus, *overrides), ranks=ranks, cwd=cwd, module=MODULE)
    return completed.stdout + completed.stderr


def start_with_fault(
    fault: Fault, corpus: Path, cwd: Path, *overrides: object, ranks: int = 2
) -> subprocess.Popen[str]:
    """Start training on two ranks under torchrun, or in one process if `ranks` is 0.

    Returns the process of torchrun or of training.
    """
    launcher = TORCHRUN if ranks else [sys.executable]
    return subprocess.Popen(
        [*launcher, "-m", MODULE, *make_arguments(fault, corpus, *overrides)],
        cwd=cwd,
        env={**commands.make_environment(), "PYTHONPATH": str(commands.REPOSITORY)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_end(process: subprocess.Popen[str], *, timeout_seconds: float) -> EndedProcess:
    """Wait for the process and kill its remaining descendants. Raises TimeoutExpired after the timeout."""
    pids = commands.list_process_tree(process.pid)
    try:
        output, _ = process.communicate(timeout=timeout_seconds)
    finally:
        remaining_pids = [pid for pid in commands.list_process_tree(process.pid) + pids if is_alive(pid)]
        commands.kill_processes(remaining_pids)
    return EndedProcess(process.returncode, output, remaining_pids)


def is_alive(pid: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
