"""A training job on two simulated nodes, on which a failed torchrun is started again, as by a batch system.

    with running_network(num_nodes=2) as net:
        job = Job(net, corpus, tmp_path / "job", "run.steps=100", num_paced_steps=100)
        job.start(*NODES)
        exit_codes = job.wait(timeout_seconds=600)

CheckpointMonitor (checkpoint_monitor.py) restarts the failed nodes, and FaultInjector (fault_injector.py) injects
faults.
"""

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
PORT = 29400  # of the rendezvous on node 1
CHECKPOINT_EVERY, CHECKPOINTS_KEPT = 3, 3  # checkpoint.every in steps, checkpoint.keep
HANG_SECONDS = 3  # the timeout of the watchdog, run.hang_seconds
GRACE_SECONDS = 2  # all processes of a torchrun must end within this time after torchrun

# The learning rate must not depend on run.steps, which is only known at the end.
OVERRIDES: tuple[str, ...] = (
    f"run.hang_seconds={HANG_SECONDS}",
    "schedule.name=constant",
    f"checkpoint.every={CHECKPOINT_EVERY}",
    f"checkpoint.keep={CHECKPOINTS_KEPT}",
    "guard.not_finite=rewind",
    "guard.skip_steps=0",  # read the same samples again, since the samples do not cause the faults
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
    """A job with one torchrun and one rank on each node.

    `directory` contains the run and a log for each node. `overrides` are config overrides. In the first
    `num_paced_steps` steps, each rank sleeps (rank.py), so that faults can happen between steps. A thread of
    CheckpointMonitor calls `restart_failed` repeatedly, which restarts nodes as long as `should_restart` is true.
    `violations` lists processes that outlived their torchrun.
    """

    def __init__(self, net: Network, corpus: Path, directory: Path, *overrides: object, num_paced_steps: int) -> None:
        self.net, self.corpus, self.directory, self.overrides = net, corpus, directory, overrides
        self.num_paced_steps, self.run = num_paced_steps, directory / "run"
        self.torchruns: dict[int, subprocess.Popen[bytes]] = {}
        self.num_starts, self.should_restart, self.violations = 0, True, list[str]()
        directory.mkdir()

    def start(self, *nodes: int) -> None:
        """Start a torchrun on each of these nodes."""
        for node in nodes:
            launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(NODES)}", "--nproc-per-node=1"]
            launcher += ["--max-restarts=1000", "--monitor-interval=0.2", "--rdzv-backend=c10d", "--rdzv-id=chaos"]
            launcher += [f"--rdzv-endpoint=n1:{PORT}", f"--rdzv-conf={RENDEZVOUS}"]
            arguments = ["-m", "tests.chaos.rank", str(self.directory), str(self.num_paced_steps)]
            arguments += map(str, commands.make_train_arguments(self.corpus, *OVERRIDES, *self.overrides))
            with (self.directory / f"node{node}.txt").open("a") as output:
                self.torchruns[node] = subprocess.Popen(
                    self.net.wrap_command(node, [*launcher, *arguments]),
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
            if self.should_restart and torchrun.poll():
                if remaining_pids := self.wait_for_exit(node):
                    self.violations.append(f"torchrun on n{node} ended and left the processes {remaining_pids}")
                    kill(remaining_pids)
                self.start(node)

    def wait_for_exit(self, *nodes: int) -> list[int]:
        """Wait until no process runs on these nodes, at most GRACE_SECONDS; return the ids of those that remain."""
        deadline = time.monotonic() + GRACE_SECONDS
        while remaining_pids := [pid for node in nodes for pid in self.net.list_processes(node)]:
            if time.monotonic() >= deadline:
                break
            time.sleep(0.05)
        return remaining_pids

    def list_ranks(self, *nodes: int) -> list[int]:
        """Return the process ids of the ranks on these nodes."""
        return [pid for node in nodes for pid in self.net.list_processes(node) if is_rank(pid)]

    def wait(self, timeout_seconds: float) -> list[int]:
        """Wait for both torchruns and return their exit codes."""
        return [self.torchruns[node].wait(timeout_seconds) for node in NODES]

    def send_signal(self, stop_signal: signal.Signals) -> None:
        """Send a signal to both torchruns, as a batch system does."""
        for torchrun in self.torchruns.values():
            torchrun.send_signal(stop_signal)

    def count_in_logs(self, text: str) -> int:
        """Count the occurrences of a text in the logs of the ranks."""
        return sum(path.read_text().count(text) for path in self.run.glob("logs/*.log"))

    def read_log_tails(self, num_lines: int = 40) -> str:
        """Return the last lines of the logs of all nodes and ranks."""
        paths = [*sorted(self.directory.glob("node*.txt")), *sorted(self.run.glob("logs/*.log"))]
        return "\n".join("\n".join((f"-- {path.name}", *path.read_text().splitlines()[-num_lines:])) for path in paths)

    def close(self) -> None:
        """Kill all processes of the job."""
        for node, torchrun in self.torchruns.items():
            kill([torchrun.pid, *self.net.list_processes(node)])
            torchrun.wait()


def is_rank(pid: int) -> bool:
    """Return whether the process is a rank and not a torchrun."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"tests.chaos.rank" in arguments and b"torch.distributed.run" not in arguments


def kill(pids: Iterable[int]) -> None:
    """Kill the processes with these ids, if they exist."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
