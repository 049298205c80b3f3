"""Which rank is slow? Ranks that work in step take equally long; but while one works, the others wait for it.

Each rank has a thread that looks, a few times a second, whether it waits in a collective. What it did not wait it
worked: the rank that works longest in a step holds up the rest.
"""

import random
import statistics
import threading
from collections.abc import Sequence
from operator import add

from dist_llm.engines.base import Engine
from dist_llm.launch.watchdog import waits
from dist_llm.launch.world import World
from dist_llm.observe.metrics import Row

EVERY_SECONDS = 0.4  # between two looks, on average: a look takes about a millisecond
LAG = 0.15  # of a step's time that a slow rank works longer than the median of the others: 5 sigma of 300 looks


class Stragglers:
    """While open, looks. Nothing on one rank, or where `seconds` is 0."""

    def __init__(self, world: World, engine: Engine, seconds: float) -> None:
        self.gather, self.ranks, self.seconds = engine.all_gather_ints, world.size, seconds if world.size > 1 else 0.0
        self.looks = self.waits = 0  # of this rank, since they were last gathered
        self._forget()
        self._over = threading.Event()

    def __enter__(self) -> "Stragglers":
        if self.seconds:
            threading.Thread(target=self._look, name="stragglers", daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()

    def report(self, rows: Sequence[Row]) -> list[Row]:
        """After the steps of these rows, on all ranks: the time that each rank worked in a step, if it is time.

        With an event where one is slow.
        """
        if not self.seconds or not rows:
            return []
        mine, (self.looks, self.waits) = (self.looks, self.waits), (0, 0)
        for sums, value in zip((self.looked, self.waited), mine, strict=True):
            sums[:] = map(add, sums, self.gather(value))
        self.took += sum(row["step_seconds"] for row in rows)
        self.steps += len(rows)
        if self.took < self.seconds or not all(self.looked):
            return []
        step, seconds = rows[-1]["step"], self.took / self.steps
        busy = [1 - waited / looked for waited, looked in zip(self.waited, self.looked, strict=True)]
        self._forget()
        row: Row = {"step": step, "busy_seconds": [round(share * seconds, 6) for share in busy]}
        rank, others = slowest(busy)
        if busy[rank] - others > LAG:
            row["event"] = (
                f"step {step}: rank {rank} is slow: it works {busy[rank] * seconds:.3f} s of a step's {seconds:.3f} s, "
                f"the median of the others {others * seconds:.3f} s; logs/rank_{rank:05d}.log names its node"
            )
        return [row]

    def _forget(self) -> None:
        self.looked, self.waited = [0] * self.ranks, [0] * self.ranks  # of all ranks, since the last report
        self.took, self.steps = 0.0, 0

    def _look(self) -> None:
        draws = random.Random()  # so that no rhythm of the steps is met always at the same place
        while not self._over.wait(draws.uniform(0.5, 1.5) * EVERY_SECONDS):
            waiting = waits()  # takes longer than an addition, in which the counts are not taken away
            self.waits += waiting
            self.looks += 1


def slowest(busy: Sequence[float]) -> tuple[int, float]:
    """(the rank that works most, the median of what the others do)."""
    rank = max(range(len(busy)), key=busy.__getitem__)
    return rank, statistics.median(share for other, share in enumerate(busy) if other != rank)
