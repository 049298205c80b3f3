"""Inject random faults into a job, drawn from a seed.

Each fault of the first round waits until the run has recovered from the previous one. Later faults may come during a
recovery.
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

from dist_llm.launch.watchdog import START_FACTOR
from tests.chaos.job import HANG_SECONDS, NODES, Job, kill
from tests.chaos.rank import nan_request
from tests.chaos.watch import TICK_SECONDS, CheckpointMonitor
from tests.netns.network import Network

# Limit from a fault to a new step. The slowest recovery is from a stopped rank after a step that a cut link made long:
# the other ranks wait for 10 times that step, exchange reports for 10 s, and torchrun waits for 30 s. Any fault may
# meet a start: a run that resumed after a cut link may still be ended by it some seconds later.
BOUND_SECONDS = 120.0 + START_FACTOR * HANG_SECONDS
OVERLAPPING_SHARE = 0.3  # share of later faults that do not wait for the recovery
PAUSE_SECONDS = 3.0  # at most, between a recovery and the next fault
START_SECONDS = 12.0  # at most, before a fault that may meet a start
EFFECT_SECONDS = 3 * TICK_SECONDS  # within which a fault takes effect
KINDS = ("rank", "node", "stop", "cut", "full", "nan", "flip")
FULL = "No space left on device"


@dataclass
class Fault:
    """A fault, and the seconds until the run had a new step; None if another fault came before."""

    kind: str
    description: str
    seconds: float  # since the start
    step: int
    recovery_seconds: float | None = None


class Monkey:
    """Injects faults into a job. Raises AssertionError if the job does not recover."""

    def __init__(
        self, seed: int, job: Job, watch: CheckpointMonitor, net: Network, disk: Path, kinds: Sequence[str]
    ) -> None:
        self.kinds = kinds
        self.draw, self.job, self.watch, self.net, self.disk = random.Random(seed), job, watch, net, disk
        self.start_time, self.faults = time.monotonic(), list[Fault]()
        self.deck = self.draw.sample(kinds, len(kinds))

    def run_faults(self, seconds: float) -> None:
        """Inject faults for this time, at least one of each kind."""
        while self.elapsed < seconds or len(self.faults) < len(self.kinds):
            fault = self.inject_fault()
            if len(self.faults) <= len(self.kinds) or self.draw.random() > OVERLAPPING_SHARE:
                fault.recovery_seconds = self.wait_for_recovery(fault)
                time.sleep(self.draw.uniform(0, PAUSE_SECONDS))
            else:
                time.sleep(self.draw.uniform(0, START_SECONDS))
        self.wait_for_recovery(fault)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.start_time

    def inject_fault(self) -> Fault:
        """Inject one fault."""
        self.deck = self.deck or self.draw.sample(self.kinds, len(self.kinds))
        fault = Fault(self.deck.pop(), "", self.elapsed, self.watch.step)
        self.faults.append(fault)
        fault.description = getattr(self, f"inject_{fault.kind}")()
        print(f"{fault.seconds:6.1f} s, step {fault.step}: {fault.description}", flush=True)
        return fault

    def wait_for_recovery(self, fault: Fault) -> float:
        """Wait for a new step; return the seconds since the fault."""
        time.sleep(EFFECT_SECONDS)
        self.watch.check()
        reached = self.watch.reached
        self.wait(lambda: self.watch.step > reached, f"the run to go on from step {reached}")
        return self.elapsed - fault.seconds

    def wait(self, ready: Callable[[], bool], description: str) -> None:
        """Wait for a condition. Raise AssertionError if it takes too long or an invariant is violated."""
        deadline = time.monotonic() + BOUND_SECONDS
        while not ready():
            assert time.monotonic() < deadline, f"waited {BOUND_SECONDS:g} s for {description}\n{self.job.tails()}"
            self.check()
            time.sleep(0.05)

    def check(self) -> None:
        faults = self.watch.faults + self.job.faults
        assert not faults, "\n".join([*faults, self.job.tails()])

    def pick_rank(self) -> tuple[int, int]:
        """Return the node and the process of a random rank."""
        node, processes = self.draw.choice(NODES), list[int]()

        def has_rank() -> bool:
            processes[:] = self.job.ranks(node)
            return bool(processes)

        self.wait(has_rank, f"a rank on n{node}")
        return node, processes[0]

    # The faults. Each method is named for its kind and returns a description.

    def inject_rank(self) -> str:
        """Kill a rank."""
        node, process = self.pick_rank()
        kill([process])
        return f"kill -9 of the rank on n{node}"

    def inject_node(self) -> str:
        """Kill all processes of a node at once."""
        node = self.draw.choice(NODES)
        with self.watch.lock:
            kill(self.net.processes(node))
        return f"kill -9 of all on n{node}"

    def inject_stop(self) -> str:
        """Stop a rank for ever."""
        node, process = self.pick_rank()
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGSTOP)
        return f"SIGSTOP of the rank on n{node}"

    def inject_cut(self) -> str:
        """Cut a node's network for a while, in which there can be no step."""
        node, seconds = self.draw.choice(NODES), self.draw.uniform(1, 3 * HANG_SECONDS)
        self.net.link(node, up=False)
        try:
            time.sleep(EFFECT_SECONDS)
            self.watch.check()
            step = self.watch.step
            time.sleep(seconds - EFFECT_SECONDS)
            self.watch.check()
            assert self.watch.step <= step, "steps were computed without a network"
        finally:
            self.net.link(node, up=True)
        return f"the link of n{node} cut for {seconds:.1f} s"

    def inject_full(self) -> str:
        """Fill the checkpoints' disk until a checkpoint cannot be written."""
        before, start_time = self.job.count_in_logs(FULL), self.elapsed
        filler = self.disk / "filler"
        with filler.open("wb") as file:
            while self.job.count_in_logs(FULL) == before and self.elapsed < start_time + 4 * HANG_SECONDS:
                state = os.fstatvfs(file.fileno())
                with suppress(OSError):  # another process was faster
                    if free_bytes := state.f_bavail * state.f_frsize:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, free_bytes)
                time.sleep(0.05)
        filler.unlink()
        return f"the disk full for {self.elapsed - start_time:.1f} s"

    def inject_nan(self) -> str:
        """Set a weight to NaN."""
        node = self.draw.choice(NODES)
        request = nan_request(self.job.directory, f"n{node}")
        request.touch()
        self.wait(lambda: not request.exists(), "a rank to take a NaN")
        return f"a NaN into a weight on n{node}"

    def inject_flip(self) -> str:
        """Damage the newest checkpoint before the run resumes from it; the one before it stays intact."""
        self.wait(lambda: len(self.watch.verified_steps()) > 1, "two checkpoints")
        kill(self.job.ranks(*NODES))  # so that no rank verifies the checkpoint before the damage
        time.sleep(0.2)
        with self.watch.lock:
            self.watch.check()
            newest = self.watch.checkpoints / f"step_{self.watch.saved:08d}"
            file = self.draw.choice(sorted(newest.iterdir()))
            self.watch.damage(file, self.draw.randrange(file.stat().st_size), 1 << self.draw.randrange(8))
        return f"a flipped bit in {newest.name}/{file.name}, and kill -9 of both ranks"


def summarize_by_kind(faults: list[Fault]) -> dict[str, dict[str, object]]:
    """Return the number of faults of each kind and their recovery seconds."""
    summary: dict[str, dict[str, object]] = {}
    for kind in KINDS:
        seconds = [round(each.recovery_seconds, 1) for each in faults if each.kind == kind and each.recovery_seconds]
        count = sum(each.kind == kind for each in faults)
        summary[kind] = {
            "count": count,
            "median_recovery_seconds": median(seconds) if seconds else None,
            "all": seconds,
        }
    return summary
