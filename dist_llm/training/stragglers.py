"""Find slow ranks. All ranks finish a step together, so step times are equal, but fast ranks wait for slow ones.

A thread on each rank samples, a few times a second, whether the rank is inside a collective. The rest of the time the
rank is busy. The rank that is busy for the longest part of a step is the straggler.
"""

import random
import statistics
import threading
from collections.abc import Sequence
from operator import add

from dist_llm.engines.base import Engine
from dist_llm.launch.flight_recorder import in_collective
from dist_llm.launch.world import World
from dist_llm.observe.metrics import MetricsRow

SAMPLE_SECONDS = 0.4  # between two samples, on average; a sample takes about a millisecond
MIN_LAG = 0.15  # a straggler's busy share minus the median of the others: 5 sigma of 300 samples


class StragglerMonitor:
    """While open, samples this rank. Does nothing on one rank or with `seconds` 0 (log.stragglers_seconds)."""

    def __init__(self, world: World, engine: Engine, seconds: float) -> None:
        self.all_gather, self.num_ranks = engine.all_gather_ints, world.world_size
        self.seconds = seconds if world.world_size > 1 else 0.0
        self.num_samples = self.num_waiting = 0  # of this rank, since the last all-gather
        self._reset()
        self._closed = threading.Event()

    def __enter__(self) -> "StragglerMonitor":
        if self.seconds:
            threading.Thread(target=self._sample, name="stragglers", daemon=True).start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._closed.set()

    def report(self, rows: Sequence[MetricsRow]) -> list[MetricsRow]:
        """Call on all ranks after the steps of `rows`. Every `seconds`, return a row with each rank's busy seconds.

        The row has an event if a rank is slow.
        """
        if not self.seconds or not rows:
            return []
        counts, (self.num_samples, self.num_waiting) = (self.num_samples, self.num_waiting), (0, 0)
        for totals, count in zip((self.samples_by_rank, self.waiting_by_rank), counts, strict=True):
            totals[:] = map(add, totals, self.all_gather(count))
        self.elapsed += sum(row["step_seconds"] for row in rows)
        self.num_steps += len(rows)
        if self.elapsed < self.seconds or not all(self.samples_by_rank):
            return []
        step, step_seconds = rows[-1]["step"], self.elapsed / self.num_steps
        counted = zip(self.waiting_by_rank, self.samples_by_rank, strict=True)
        busy = [1 - waiting / samples for waiting, samples in counted]
        self._reset()
        row: MetricsRow = {"step": step, "busy_seconds": [round(share * step_seconds, 6) for share in busy]}
        rank, median_of_others = find_slowest(busy)
        if busy[rank] - median_of_others > MIN_LAG:
            row["event"] = (
                f"step {step}: rank {rank} is slow: it is busy for {busy[rank] * step_seconds:.3f} s of a step of "
                f"{step_seconds:.3f} s, the median of the others is {median_of_others * step_seconds:.3f} s; "
                f"logs/rank_{rank:05d}.log names its node"
            )
        return [row]

    def _reset(self) -> None:
        self.samples_by_rank, self.waiting_by_rank = [0] * self.num_ranks, [0] * self.num_ranks
        self.elapsed, self.num_steps = 0.0, 0

    def _sample(self) -> None:
        rng = random.Random()  # random intervals, so that samples do not fall on the same part of each step
        while not self._closed.wait(rng.uniform(0.5, 1.5) * SAMPLE_SECONDS):
            waiting = in_collective()  # slow: read it first, so that the two counters change together
            self.num_waiting += waiting
            self.num_samples += 1


def find_slowest(busy: Sequence[float]) -> tuple[int, float]:
    """Return (the rank with the largest busy share, the median of the other shares)."""
    rank = max(range(len(busy)), key=busy.__getitem__)
    return rank, statistics.median(share for other, share in enumerate(busy) if other != rank)
