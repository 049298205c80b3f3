"""Faults, drawn from a seed. The first deck is dealt with patience, each fault after the run went on from the last;
later ones may come while it still recovers."""

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
from tests.chaos.rank import order
from tests.chaos.watch import TICK_SECONDS, Watch
from tests.netns.network import Network

# From the end of a fault to a step that was not taken before. The longest is a rank that is stopped after a step that a
# cut link made long: the others wait for 10 times that, ask and speak for 10 s, and torchrun waits for 30 s. Any may
# meet a start: a run that went on after a cut link may end of it all the same, some seconds later.
BOUND_SECONDS = 120.0 + START_FACTOR * HANG_SECONDS
IMPATIENT = 0.3  # of the faults after the first deck are followed by another before that
PAUSE_SECONDS = 3.0  # at most, until the next fault
START_SECONDS = 12.0  # the same where it is to meet a run that starts
DIES_SECONDS = 3 * TICK_SECONDS  # in which what was begun is seen to its end
KINDS = ("rank", "node", "stop", "cut", "full", "nan", "flip")
FULL = "No space left on device"


@dataclass
class Fault:
    """What was done, when, and how long until the run was beyond where it had been; None: another came before."""

    kind: str
    what: str
    seconds: float  # since the monkey's birth
    step: int
    recovery_seconds: float | None = None


class Monkey:
    """Does to a job what machines do to it. Raises AssertionError where it does not recover."""

    def __init__(self, seed: int, job: Job, watch: Watch, net: Network, disk: Path, kinds: Sequence[str]) -> None:
        self.kinds = kinds
        self.draw, self.job, self.watch, self.net, self.disk = random.Random(seed), job, watch, net, disk
        self.born, self.faults = time.monotonic(), list[Fault]()
        self.deck = self.draw.sample(kinds, len(kinds))

    def rage(self, seconds: float) -> None:
        """For so long, and at least one fault of each kind."""
        while self.age < seconds or len(self.faults) < len(self.kinds):
            fault = self.strike()
            if len(self.faults) <= len(self.kinds) or self.draw.random() > IMPATIENT:
                fault.recovery_seconds = self.recover(fault)
                time.sleep(self.draw.uniform(0, PAUSE_SECONDS))
            else:
                time.sleep(self.draw.uniform(0, START_SECONDS))
        self.recover(fault)

    @property
    def age(self) -> float:
        return time.monotonic() - self.born

    def strike(self) -> Fault:
        """One fault."""
        self.deck = self.deck or self.draw.sample(self.kinds, len(self.kinds))
        fault = Fault(self.deck.pop(), "", self.age, self.watch.step)
        self.faults.append(fault)
        fault.what = getattr(self, fault.kind)()
        print(f"{fault.seconds:6.1f} s, step {fault.step}: {fault.what}", flush=True)
        return fault

    def recover(self, fault: Fault) -> float:
        """Wait for a step that was not taken before; seconds since the fault."""
        time.sleep(DIES_SECONDS)
        self.watch.look()
        reached = self.watch.reached
        self.wait(lambda: self.watch.step > reached, f"the run to go on from step {reached}")
        return self.age - fault.seconds

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Raises AssertionError where it takes too long, or something went wrong meanwhile."""
        until = time.monotonic() + BOUND_SECONDS
        while not ready():
            assert time.monotonic() < until, f"waited {BOUND_SECONDS:g} s for {what}\n{self.job.tails()}"
            self.check()
            time.sleep(0.05)

    def check(self) -> None:
        faults = self.watch.faults + self.job.faults
        assert not faults, "\n".join([*faults, self.job.tails()])

    def some_rank(self) -> tuple[int, int]:
        """(node, process)."""
        node, found = self.draw.choice(NODES), list[int]()

        def there() -> bool:
            found[:] = self.job.ranks(node)
            return bool(found)

        self.wait(there, f"a rank on n{node}")
        return node, found[0]

    # The kinds. Each says what it did.

    def rank(self) -> str:
        """A rank dies."""
        node, process = self.some_rank()
        kill([process])
        return f"kill -9 of the rank on n{node}"

    def node(self) -> str:
        """All on a node die at once."""
        node = self.draw.choice(NODES)
        with self.watch.lock:
            kill(self.net.processes(node))
        return f"kill -9 of all on n{node}"

    def stop(self) -> str:
        """A rank stands still for ever."""
        node, process = self.some_rank()
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGSTOP)
        return f"SIGSTOP of the rank on n{node}"

    def cut(self) -> str:
        """A node's cable is out for a while, in which there can be no step."""
        node, seconds = self.draw.choice(NODES), self.draw.uniform(1, 3 * HANG_SECONDS)
        self.net.link(node, up=False)
        try:
            time.sleep(DIES_SECONDS)
            self.watch.look()
            step = self.watch.step
            time.sleep(seconds - DIES_SECONDS)
            self.watch.look()
            assert self.watch.step <= step, "steps were taken without a network"
        finally:
            self.net.link(node, up=True)
        return f"the link of n{node} cut for {seconds:.1f} s"

    def full(self) -> str:
        """The disk of the checkpoints has no room, until one could not be written."""
        before, begin = self.job.said(FULL), self.age
        filler = self.disk / "filler"
        with filler.open("wb") as file:
            while self.job.said(FULL) == before and self.age < begin + 4 * HANG_SECONDS:
                state = os.fstatvfs(file.fileno())
                with suppress(OSError):  # another was faster
                    if room := state.f_bavail * state.f_frsize:
                        os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, room)
                time.sleep(0.05)
        filler.unlink()
        return f"the disk full for {self.age - begin:.1f} s"

    def nan(self) -> str:
        """A weight is not a number any more."""
        node = self.draw.choice(NODES)
        ordered = order(self.job.place, f"n{node}")
        ordered.touch()
        self.wait(lambda: not ordered.exists(), "a rank to take a NaN")
        return f"a NaN into a weight on n{node}"

    def flip(self) -> str:
        """The newest checkpoint is not what was saved, when the run wants it; the one before it is."""
        self.wait(lambda: len(self.watch.whole()) > 1, "two checkpoints")
        kill(self.job.ranks(*NODES))  # so that none has verified what is damaged then
        time.sleep(0.2)
        with self.watch.lock:
            self.watch.look()
            newest = self.watch.checkpoints / f"step_{self.watch.saved:08d}"
            file = self.draw.choice(sorted(newest.iterdir()))
            self.watch.damage(file, self.draw.randrange(file.stat().st_size), 1 << self.draw.randrange(8))
        return f"a flipped bit in {newest.name}/{file.name}, and kill -9 of both ranks"


def by_kind(faults: list[Fault]) -> dict[str, dict[str, object]]:
    """How many there were, and the seconds until the run was where it had been."""
    found: dict[str, dict[str, object]] = {}
    for kind in KINDS:
        took = [round(each.recovery_seconds, 1) for each in faults if each.kind == kind and each.recovery_seconds]
        count = sum(each.kind == kind for each in faults)
        found[kind] = {"count": count, "median_recovery_seconds": median(took) if took else None, "all": took}
    return found
