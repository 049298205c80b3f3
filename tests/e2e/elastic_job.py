"""A training job that continues with the remaining nodes if a node dies, as torchrun starts it.

    job = Job(max_nodes=2, steps=80)
    with run_node("first", f"localhost:{port}", corpus, tmp_path, job) as first:
        with run_node("second", f"localhost:{port}", corpus, tmp_path, job):
            wait_until(lambda: count_rows(tmp_path) >= 4, tmp_path)  # then the second node is killed
        assert first.wait(timeout=120) == 0

Each node is a torchrun with one rank. Its output is in the file NAME.txt of the working directory.
"""

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from . import commands

STEP_DELAY_SECONDS = "0.15"  # each step takes this much longer, so that nodes can die between steps


@dataclass(frozen=True, kw_only=True)
class Job:
    """The settings of a job of one to `max_nodes` nodes with one rank each.

    `overrides` are config overrides, `environment` are additional variables. `wrap_command` wraps a command so that it
    runs on another node.
    """

    max_nodes: int
    steps: int
    overrides: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    wrap_command: Callable[[list[str]], list[str]] = list


@contextmanager
def run_node(name: str, rendezvous: str, corpus: Path, cwd: Path, job: Job) -> Iterator[subprocess.Popen[bytes]]:
    """Start torchrun with one rank, for a job of one to `job.max_nodes` nodes; kill it after the block.

    `rendezvous` is host:port. The output goes to `cwd/NAME.txt`.
    """
    rendezvous_options = (
        "last_call_timeout=2,join_timeout=60,read_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=3"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes=1:{job.max_nodes}", "--nproc-per-node=1"]
    launcher += ["--max-restarts=10", "--rdzv-backend=c10d", f"--rdzv-endpoint={rendezvous}", "--rdzv-id=test"]
    launcher += [f"--rdzv-conf={rendezvous_options}", "--monitor-interval=0.2"]
    arguments = commands.make_train_arguments(corpus, f"run.steps={job.steps}", "checkpoint.every=1", *job.overrides)
    with (cwd / f"{name}.txt").open("w") as output:
        process = subprocess.Popen(
            job.wrap_command([*launcher, "-m", "tests.e2e.run_slowly", STEP_DELAY_SECONDS, *map(str, arguments)]),
            cwd=cwd,
            env={
                **commands.make_environment(),
                "PYTHONPATH": str(commands.REPOSITORY),
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                **job.environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            kill_node(process)


def kill_node(process: subprocess.Popen[bytes]) -> None:
    """Kill all processes of a node at once."""
    commands.kill_processes(commands.list_process_tree(process.pid))
    process.wait()


def count_rows(cwd: Path) -> int:
    """Return the number of training steps in the metrics of the run."""
    path = cwd / "run" / "metrics.jsonl"
    return len(commands.read_step_rows(cwd / "run")) if path.exists() else 0


def wait_until(is_ready: Callable[[], bool], cwd: Path, *, timeout_seconds: float = 90) -> None:
    """Wait until `is_ready()` returns true; raise AssertionError with the logs after the timeout."""
    deadline = time.monotonic() + timeout_seconds
    while not is_ready():
        logs = "\n".join(path.read_text() for path in cwd.glob("*.txt"))
        assert time.monotonic() < deadline, f"never ready:\n{logs}"
        time.sleep(0.1)


def is_listening(port: int) -> bool:
    """Return whether a process of this machine listens on the TCP port."""
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


def count_in_output(cwd: Path, text: str) -> int:
    """Count the occurrences of a text in the output of all nodes."""
    return sum(path.read_text().count(text) for path in cwd.glob("*.txt"))
