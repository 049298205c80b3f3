"""A job of two nodes, kept running as a batch system does: a torchrun that ends with an error is started again."""

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
EVERY, KEEP = 3, 3  # steps between checkpoints, and how many are kept
HANG_SECONDS = 3
GRACE_SECONDS = 2  # after which nothing is left of a torchrun that ended

# What the run does where it could do otherwise. The rate must not depend on run.steps, which is not known beforehand.
OVERRIDES: tuple[str, ...] = (
    f"run.hang_seconds={HANG_SECONDS}",
    "schedule.name=constant",
    f"checkpoint.every={EVERY}",
    f"checkpoint.keep={KEEP}",
    "guard.not_finite=rewind",
    "guard.skip_steps=0",  # the same samples again: it is the machine that erred
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
    """One rank on each node; its first `paced` steps are slow ones. `place` holds what it writes, a file per node too.

    `keep` is called again and again, by one thread; `faults` are what it saw go wrong. While it is `kept`, what ends is
    started again.
    """

    def __init__(self, net: Network, corpus: Path, place: Path, paced: int, *overrides: object) -> None:
        self.net, self.corpus, self.place, self.paced, self.overrides = net, corpus, place, paced, overrides
        self.run = place / "run"
        self.torchruns: dict[int, subprocess.Popen[bytes]] = {}
        self.starts, self.kept, self.faults = 0, True, list[str]()
        place.mkdir()

    def start(self, *nodes: int) -> None:
        for node in nodes:
            launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(NODES)}", "--nproc-per-node=1"]
            launcher += ["--max-restarts=1000", "--monitor-interval=0.2", "--rdzv-backend=c10d", "--rdzv-id=chaos"]
            launcher += [f"--rdzv-endpoint=n1:{PORT}", f"--rdzv-conf={RENDEZVOUS}"]
            words = ["-m", "tests.chaos.rank", str(self.place), str(self.paced)]
            words += map(str, commands.train_arguments(self.corpus, *OVERRIDES, *self.overrides))
            with (self.place / f"node{node}.txt").open("a") as output:
                self.torchruns[node] = subprocess.Popen(
                    self.net.on(node, [*launcher, *words]),
                    cwd=self.place,
                    env={**commands.environment(), **ENVIRONMENT},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            self.starts += 1

    def keep(self) -> None:
        """Start again each node whose torchrun ended with an error. None may have left a process behind."""
        for node, torchrun in self.torchruns.items():
            if self.kept and torchrun.poll():
                if left := self.left(node):
                    self.faults.append(f"torchrun on n{node} ended, and left {left}")
                    kill(left)
                self.start(node)

    def left(self, *nodes: int) -> list[int]:
        """What still runs on these nodes though it is over: after a while in which the last processes may end."""
        until = time.monotonic() + GRACE_SECONDS
        while (found := [each for node in nodes for each in self.net.processes(node)]) and time.monotonic() < until:
            time.sleep(0.05)
        return found

    def ranks(self, *nodes: int) -> list[int]:
        """The processes that train, of these nodes."""
        return [each for node in nodes for each in self.net.processes(node) if is_rank(each)]

    def wait(self, seconds: float) -> list[int]:
        """The exit codes of both torchruns, which are about to end."""
        return [self.torchruns[node].wait(seconds) for node in NODES]

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to both torchruns, as a batch system does."""
        for torchrun in self.torchruns.values():
            torchrun.send_signal(number)

    def said(self, words: str) -> int:
        """How often, in the logs of the ranks."""
        return sum(path.read_text().count(words) for path in self.run.glob("logs/*.log"))

    def tails(self, lines: int = 40) -> str:
        """The last that each node and rank said."""
        paths = [*sorted(self.place.glob("node*.txt")), *sorted(self.run.glob("logs/*.log"))]
        return "\n".join("\n".join((f"-- {path.name}", *path.read_text().splitlines()[-lines:])) for path in paths)

    def close(self) -> None:
        for node, torchrun in self.torchruns.items():
            kill([torchrun.pid, *self.net.processes(node)])
            torchrun.wait()


def is_rank(process: int) -> bool:
    """Rather than a torchrun."""
    try:
        words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"tests.chaos.rank" in words and b"torch.distributed.run" not in words


def kill(processes: Iterable[int]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
