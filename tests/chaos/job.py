"""A training job on two nodes that is restarted as by a batch system: a torchrun that fails starts again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from tests.e2e import commands
from tests.netns.network import Network

NODES = (1, 2)
PORT = 29400
CHECKPOINT_EVERY, CHECKPOINTS_KEPT = 3, 3
HANG_SECONDS = 3
GRACE_SECONDS = 2  # within which all processes of a torchrun end

# The learning rate must not depend on run.steps, which is not known beforehand.
OVERRIDES: tuple[str, ...] = (
    f"run.hang_seconds={HANG_SECONDS}",
    "schedule.name=constant",
    f"checkpoint.every={CHECKPOINT_EVERY}",
    f"checkpoint.keep={CHECKPOINTS_KEPT}",
    "guard.not_finite=rewind",
    "guard.skip_steps=0",  # read the same samples again: the fault is the machine's
    "guard.budget=1000",
)
RENDEZVOUS = "last_call_timeout=2,join_timeout=60,read_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=3"
ENVIRONMENT = {
    "PYTHONPATH": str(commands.REPOSITORY),
    "GLOO_SOCKET_IFNAME": "eth0",
    "TP_SOCKET_IFNAME": "eth0",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


class Job:
    """One rank on each node; the first `paced` steps are slow. `directory` contains the run and a log for each node.

    One thread calls `restart_failed` repeatedly; `faults` lists what it found wrong. It restarts nodes as long as
    `restarting` is true.
    """

    def __init__(self, net: Network, corpus: Path, directory: Path, paced: int, *overrides: object) -> None:
        self.net, self.corpus, self.directory, self.paced, self.overrides = net, corpus, directory, paced, overrides
        self.run = directory / "run"
        self.torchruns: dict[int, subprocess.Popen[bytes]] = {}
        self.num_starts, self.restarting, self.faults = 0, True, list[str]()
        directory.mkdir()

    def start(self, *nodes: int) -> None:
        for node in nodes:
            launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(NODES)}", "--nproc-per-node=1"]
            launcher += ["--max-restarts=1000", "--monitor-interval=0.2", "--rdzv-backend=c10d", "--rdzv-id=chaos"]
            launcher += [f"--rdzv-endpoint=n1:{PORT}", f"--rdzv-conf={RENDEZVOUS}"]
            arguments = ["-m", "tests.chaos.rank", str(self.directory), str(self.paced)]
            arguments += map(str, commands.make_train_arguments(self.corpus, *OVERRIDES, *self.overrides))
            with (self.directory / f"node{node}.txt").open("a") as output:
                self.torchruns[node] = subprocess.Popen(
                    self.net.on(node, [*launcher, *arguments]),
                    cwd=self.directory,
                    env={**commands.make_environment(), **ENVIRONMENT},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.num_starts += 1

    def restart_failed(self) -> None:
        """Restart each node whose torchrun ended with an error. No node may have a remaining process."""
        for node, torchrun in self.torchruns.items():
            if self.restarting and torchrun.poll():
                if remaining := self.remaining_processes(node):
                    self.faults.append(f"torchrun on n{node} ended, and left {remaining}")
                    kill(remaining)
                self.start(node)

    def remaining_processes(self, *nodes: int) -> list[int]:
        """Return the processes that still run on these nodes after a grace period."""
        deadline = time.monotonic() + GRACE_SECONDS
        while remaining := [process for node in nodes for process in self.net.processes(node)]:
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        return remaining

    def ranks(self, *nodes: int) -> list[int]:
        """Return the processes of the ranks on these nodes."""
        return [process for node in nodes for process in self.net.processes(node) if is_rank(process)]

    def wait(self, seconds: float) -> list[int]:
        """Wait for both torchruns and return their exit codes."""
        return [self.torchruns[node].wait(seconds) for node in NODES]

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to both torchruns, as a batch system does."""
        for torchrun in self.torchruns.values():
            torchrun.send_signal(number)

    def count_in_logs(self, text: str) -> int:
        """Count the occurrences of a text in the logs of the ranks."""
        return sum(path.read_text().count(text) for path in self.run.glob("logs/*.log"))

    def tails(self, lines: int = 40) -> str:
        """Return the last lines of each node's and each rank's log."""
        paths = [*sorted(self.directory.glob("node*.txt")), *sorted(self.run.glob("logs/*.log"))]
        return "\n".join("\n".join((f"-- {path.name}", *path.read_text().splitlines()[-lines:])) for path in paths)

    def close(self) -> None:
        for node, torchrun in self.torchruns.items():
            kill([torchrun.pid, *self.net.processes(node)])
            torchrun.wait()


def is_rank(process: int) -> bool:
    """Whether the process is a rank and not a torchrun."""
    try:
        arguments = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"tests.chaos.rank" in arguments and b"torch.distributed.run" not in arguments


def kill(processes: Iterable[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
