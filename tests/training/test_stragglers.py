"""The straggler is the rank that waits least often in collectives."""

from types import SimpleNamespace
from typing import Any

import pytest

from dist_llm.launch.world import World
from dist_llm.training.stragglers import StragglerMonitor, find_slowest


def make_rows(step: int) -> list[dict[str, Any]]:
    """Return the metrics of the step and of the one before it."""
    return [{"step": step - 1, "step_seconds": 2.0}, {"step": step, "step_seconds": 2.0}]


def report_of_rank_0(counts: list[tuple[int, int]], seconds: float = 4.0) -> list[dict[str, Any]]:
    """Return the rows of rank 0. `counts` has (number of samples, samples within a collective) of each rank."""
    num_samples, num_waiting = map(list, zip(*counts, strict=True))
    answers = iter([num_samples, num_waiting, num_samples, num_waiting])
    monitor = StragglerMonitor(
        World(rank=0, world_size=len(counts)), SimpleNamespace(all_gather_ints=lambda value: next(answers)), seconds
    )  # type: ignore[arg-type]
    monitor.num_samples, monitor.num_waiting = counts[0]
    first_rows = monitor.gather_report(make_rows(2))
    return first_rows or monitor.gather_report(make_rows(4))


def test_the_slow_rank_is_named() -> None:
    (row,) = report_of_rank_0([(100, 40), (100, 10), (100, 50)])
    assert row["busy_seconds"] == [1.2, 1.8, 1.0]
    assert row["event"].startswith(
        "step 2: rank 1 is slow: it is busy for 1.800 s of a step of 2.000 s, the median of the others"
    )
    assert "others is 1.100 s; logs/rank_00001.log" in row["event"]


def test_similar_ranks_are_not_named() -> None:
    (row,) = report_of_rank_0([(100, 40), (200, 60), (100, 42)])
    assert "event" not in row
    assert row["busy_seconds"] == pytest.approx([1.2, 1.4, 1.16])


def test_samples_add_up_until_the_interval_has_passed() -> None:
    (row,) = report_of_rank_0([(10, 4), (10, 5)], seconds=8.0)
    assert row["step"] == 4
    assert row["busy_seconds"] == pytest.approx([1.2, 1.0])


def test_one_rank_reports_nothing() -> None:
    monitor = StragglerMonitor(World(), SimpleNamespace(all_gather_ints=lambda value: [value]), interval_seconds=1.0)  # type: ignore[arg-type]
    assert monitor.gather_report(make_rows(2)) == []


def test_find_slowest() -> None:
    assert find_slowest([0.5, 0.9, 0.6, 0.8]) == (1, 0.6)
