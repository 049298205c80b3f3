"""Inject random faults into a job, drawn from a seed, and check that the job recovers.

    injector = FaultInjector(seed, job, monitor, net, disk, kinds=FAULT_KINDS)
    injector.inject_faults(seconds=600)  # raises AssertionError if the job does not recover
    print(summarize_by_kind(injector.faults))

The first fault of each kind is injected after the run has recovered from the previous fault. Later faults may happen
during a recovery.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from dist_llm.launch.watchdog import START_TIMEOUT_FACTOR
from tests.chaos.checkpoint_monitor import CHECK_INTERVAL_SECONDS, CheckpointMonitor
from tests.chaos.job import HANG_SECONDS, NODES, Job, kill
from tests.chaos.rank import get_nan_request_path
from tests.netns.network import Network

# Timeout from a fault to a new step. The slowest recovery is from a stopped rank after a step that a cut link made
# long: the other ranks wait for 10 times that step, exchange reports for 10 s, and torchrun waits for 30 s. A fault may
# happen during a start: a cut link may end a run some seconds after the run has resumed.
RECOVERY_TIMEOUT_SECONDS = 120.0 + START_TIMEOUT_FACTOR * HANG_SECONDS
OVERLAPPING_FRACTION = 0.3  # of the later faults do not wait for the recovery from the previous fault
MAX_PAUSE_SECONDS = 3.0  # between a recovery and the next fault
MAX_OVERLAP_PAUSE_SECONDS = 12.0  # before a fault that may happen during a recovery
EFFECT_SECONDS = 3 * CHECK_INTERVAL_SECONDS  # a fault takes effect within this time
FAULT_KINDS = ("killed_rank", "killed_node", "stopped_rank", "cut_link", "full_disk", "nan_weights", "bit_flip")
DISK_FULL_MESSAGE = "No space left on device"


@dataclass
class Fault:
    """A fault, its time, and the step of the run before it.

    `recovery_seconds` is the time until the run had a new step; None if the injector did not wait for it.
    """

    kind: str
    description: str
    seconds: float  # since the start of the injector
    step: int
    recovery_seconds: float | None = None


class RankProcess(NamedTuple):
    """A rank of the job."""

    node: int  # number of its simulated node
    pid: int


class FaultInjector:
    """Injects faults into a job. Raises AssertionError if the job does not recover.

    `disk` is the mounted file system of the checkpoints. `kinds` are the kinds of FAULT_KINDS to inject.
    """

    def __init__(
        self, seed: int, job: Job, monitor: CheckpointMonitor, net: Network, disk: Path, *, kinds: Sequence[str]
    ) -> None:
        self.kinds = kinds
        self.rng, self.job, self.monitor, self.net, self.disk = random.Random(seed), job, monitor, net, disk
        self.start_time, self.faults = time.monotonic(), list[Fault]()
        self.next_kinds = self.rng.sample(kinds, len(kinds))

    def inject_faults(self, *, seconds: float) -> None:
        """Inject faults for `seconds`, at least one of each kind."""
        while self.elapsed_seconds < seconds or len(self.faults) < len(self.kinds):
            fault = self.inject_fault()
            if len(self.faults) <= len(self.kinds) or self.rng.random() > OVERLAPPING_FRACTION:
                fault.recovery_seconds = self.wait_for_recovery(fault)
                time.sleep(self.rng.uniform(0, MAX_PAUSE_SECONDS))
            else:
                time.sleep(self.rng.uniform(0, MAX_OVERLAP_PAUSE_SECONDS))
        self.wait_for_recovery(fault)

    @property
    def elapsed_seconds(self) -> float:
        """The time since the start of the injector."""
        return time.monotonic() - self.start_time

    def inject_fault(self) -> Fault:
        """Inject one fault of the next kind; each round has all kinds in random order."""
        self.next_kinds = self.next_kinds or self.rng.sample(self.kinds, len(self.kinds))
        kind = self.next_kinds.pop()
        fault = Fault(kind, description="", seconds=self.elapsed_seconds, step=self.monitor.step)
        self.faults.append(fault)
        fault.description = getattr(self, f"inject_{fault.kind}")()
        print(f"{fault.seconds:6.1f} s, step {fault.step}: {fault.description}", flush=True)
        return fault

    def wait_for_recovery(self, fault: Fault) -> float:
        """Wait for a new step; return the seconds since the fault."""
        time.sleep(EFFECT_SECONDS)
        self.monitor.check()
        highest_step = self.monitor.highest_step
        self.wait(lambda: self.monitor.step > highest_step, f"the run to go on from step {highest_step}")
        return self.elapsed_seconds - fault.seconds

    def wait(self, is_ready: Callable[[], bool], description: str) -> None:
        """Wait for a condition. Raise AssertionError if it takes too long or an invariant is violated."""
        deadline = time.monotonic() + RECOVERY_TIMEOUT_SECONDS
        while not is_ready():
            assert time.monotonic() < deadline, (
                f"waited {RECOVERY_TIMEOUT_SECONDS:g} s for {description}\n{self.job.read_log_tails()}"
            )
            self.check()
            time.sleep(0.05)

    def check(self) -> None:
        """Raise AssertionError if an invariant is violated."""
        violations = self.monitor.violations + self.job.violations
        assert not violations, "\n".join([*violations, self.job.read_log_tails()])

    def choose_rank(self) -> RankProcess:
        """Wait for a rank on a random node, and return it."""
        node, pids = self.rng.choice(NODES), list[int]()

        def has_rank() -> bool:
            pids[:] = self.job.list_ranks(node)
            return bool(pids)

        self.wait(has_rank, f"a rank on n{node}")
        return RankProcess(node, pids[0])

    # The faults. Each method is named for its kind and returns a description.

    def inject_killed_rank(self) -> str:
        """Kill a rank."""
        node, pid = self.choose_rank()
        kill([pid])
        return f"kill -9 of the rank on n{node}"

    def inject_killed_node(self) -> str:
        """Kill all processes of a node."""
        node = self.rng.choice(NODES)
        with self.monitor.lock:
            kill(self.net.list_processes(node))
        return f"kill -9 of all processes on n{node}"

    def inject_stopped_rank(self) -> str:
        """Stop a rank, which never continues."""
        node, pid = self.choose_rank()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        return f"SIGSTOP of the rank on n{node}"

    def inject_cut_link(self) -> str:
        """Disconnect a node for some seconds, in which the run can compute no step."""
        node, seconds = self.rng.choice(NODES), self.rng.uniform(1, 3 * HANG_SECONDS)
        self.net.set_link(node, up=False)
        try:
            time.sleep(EFFECT_SECONDS)
            self.monitor.check()
            step = self.monitor.step
            time.sleep(seconds - EFFECT_SECONDS)
            self.monitor.check()
            assert self.monitor.step <= step, "steps were computed without a network"
        finally:
            self.net.set_link(node, up=True)
        return f"the link of n{node} cut for {seconds:.1f} s"

    def inject_full_disk(self) -> str:
        """Fill the disk of the checkpoints until a checkpoint cannot be written."""
        num_messages, start_seconds = self.job.count_in_logs(DISK_FULL_MESSAGE), self.elapsed_seconds
        end_seconds = start_seconds + 4 * HANG_SECONDS
        filler = self.disk / "filler"
        with filler.open("wb") as file:
            while self.job.count_in_logs(DISK_FULL_MESSAGE) == num_messages and self.elapsed_seconds < end_seconds:
                state = os.fstatvfs(file.fileno())
                with suppress(OSError):  # another process has used the space
                    if free_bytes := state.f_bavail * state.f_frsize:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free_bytes)
                time.sleep(0.05)
        filler.unlink()
        return f"the disk full for {self.elapsed_seconds - start_seconds:.1f} s"

    def inject_nan_weights(self) -> str:
        """Request that a rank sets a weight to NaN."""
        node = self.rng.choice(NODES)
        request = get_nan_request_path(self.job.directory, f"n{node}")
        request.touch()
        self.wait(lambda: not request.exists(), "a rank to set a weight to NaN")
        return f"a NaN in a weight on n{node}"

    def inject_bit_flip(self) -> str:
        """Flip a bit in the newest checkpoint and kill the ranks; the run must resume from the checkpoint before it."""
        self.wait(lambda: len(self.monitor.list_verified_steps()) > 1, "two checkpoints")
        kill(self.job.list_ranks(*NODES))  # so that no rank verifies the checkpoint before the damage
        time.sleep(0.2)
        with self.monitor.lock:
            self.monitor.check()
            checkpoint = self.monitor.checkpoints / f"step_{self.monitor.saved_step:08d}"
            file = self.rng.choice(sorted(checkpoint.iterdir()))
            offset, bit_mask = self.rng.randrange(file.stat().st_size), 1 << self.rng.randrange(8)
            self.monitor.damage(file, offset, bit_mask)
        return f"a flipped bit in {checkpoint.name}/{file.name}, and kill -9 of both ranks"


def summarize_by_kind(faults: list[Fault]) -> dict[str, dict[str, object]]:
    """Return the number of faults of each kind, and their recovery seconds."""
    summary: dict[str, dict[str, object]] = {}
    for kind in FAULT_KINDS:
        faults_of_kind = [fault for fault in faults if fault.kind == kind]
        seconds = [round(fault.recovery_seconds, 1) for fault in faults_of_kind if fault.recovery_seconds]
        summary[kind] = {
            "count": len(faults_of_kind),
            "median_recovery_seconds": median(seconds) if seconds else None,
            "all": seconds,
        }
    return summary
