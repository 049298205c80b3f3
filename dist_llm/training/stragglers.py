"""Find slow ranks (stragglers). Step times are equal on all ranks, because fast ranks wait for slow ones.

A thread on each rank samples every 0.4 s on average whether the rank waits in a collective. Otherwise the rank is busy.
The rank with the largest busy share of a step is the straggler.
"""

import random
import statistics
import threading
from collections.abc import Sequence
from operator import add

from dist_llm.engines.base import Engine
from dist_llm.launch.flight_recorder import is_in_collective
from dist_llm.launch.world import World
from dist_llm.observe.metrics import MetricsRow
from dist_llm.training.callback import Callback, TrainingState

SAMPLE_SECONDS = 0.4  # mean time between two samples; one sample takes about 1 ms
# Minimum of (busy share of the straggler) - (median busy share of the other ranks): 5 standard deviations of 300
# samples.
MIN_LAG = 0.15


class StragglerMonitor(Callback):
    """From start to close, samples whether this rank waits, and reports a slow rank every `interval_seconds`.

    `interval_seconds` is log.stragglers_seconds. The monitor does nothing if the interval is None or there is only one
    rank.
    """

    metric_names = ("busy_seconds",)

    def __init__(self, world: World, engine: Engine, interval_seconds: float | None) -> None:
        self.all_gather, self.num_ranks = engine.all_gather_ints, world.world_size
        self.interval_seconds = (interval_seconds or 0.0) if world.world_size > 1 else 0.0
        # Samples of this rank since the last all-gather: all, and those in which the rank waited.
        self.num_samples = self.num_waiting = 0
        self._reset()
        self._closed = threading.Event()

    def on_start(self, state: TrainingState) -> None:
        if self.interval_seconds:
            threading.Thread(target=self._sample_loop, name="stragglers", daemon=True).start()

    def close(self, state: TrainingState) -> None:
        self._closed.set()

    def on_metrics(self, state: TrainingState, rows: Sequence[MetricsRow]) -> Sequence[MetricsRow]:
        return self.gather_report([row for row in rows if "step_seconds" in row])

    def gather_report(self, rows: Sequence[MetricsRow]) -> list[MetricsRow]:
        """All-gather the busy seconds of each rank, and return them as a row if an interval has passed, else no row.

        Every rank must call this after the steps of `rows`. The returned row has an event if a rank is slow.
        """
        if not self.interval_seconds or not rows:
            return []
        counts, (self.num_samples, self.num_waiting) = (self.num_samples, self.num_waiting), (0, 0)
        for totals, count in zip((self.samples_by_rank, self.waiting_by_rank), counts, strict=True):
            totals[:] = map(add, totals, self.all_gather(count))
        self.elapsed_seconds += sum(row["step_seconds"] for row in rows)
        self.num_steps += len(rows)
        if self.elapsed_seconds < self.interval_seconds or not all(self.samples_by_rank):
            return []
        step, step_seconds = rows[-1]["step"], self.elapsed_seconds / self.num_steps
        counts_by_rank = zip(self.waiting_by_rank, self.samples_by_rank, strict=True)
        busy_shares = [1 - num_waiting / num_samples for num_waiting, num_samples in counts_by_rank]
        self._reset()
        row: MetricsRow = {"step": step, "busy_seconds": [round(share * step_seconds, 6) for share in busy_shares]}
        rank, median_of_others = find_slowest(busy_shares)
        if busy_shares[rank] - median_of_others > MIN_LAG:
            row["event"] = (
                f"step {step}: rank {rank} is slow: it is busy for {busy_shares[rank] * step_seconds:.3f} s of a step "
                f"of {step_seconds:.3f} s, the median of the others is {median_of_others * step_seconds:.3f} s; "
                f"logs/rank_{rank:05d}.log names its node"
            )
        return [row]

    def _reset(self) -> None:
        self.samples_by_rank, self.waiting_by_rank = [0] * self.num_ranks, [0] * self.num_ranks
        self.elapsed_seconds, self.num_steps = 0.0, 0

    def _sample_loop(self) -> None:
        rng = random.Random()  # random intervals sample all parts of a step equally often
        while not self._closed.wait(rng.uniform(0.5, 1.5) * SAMPLE_SECONDS):
            is_waiting = is_in_collective()  # takes 1 ms, so it runs before the two counters change
            self.num_waiting += is_waiting
            self.num_samples += 1


def find_slowest(busy_shares: Sequence[float]) -> tuple[int, float]:
    """Return (the rank with the largest busy share, the median of the other shares)."""
    rank = max(range(len(busy_shares)), key=busy_shares.__getitem__)
    return rank, statistics.median(share for other_rank, share in enumerate(busy_shares) if other_rank != rank)
