"""Which rank is slow, from how often each was seen waiting."""

from types import SimpleNamespace
from typing import Any

import pytest

from dist_llm.launch.world import World
from dist_llm.train.stragglers import Stragglers, slowest


def rows(step: int) -> list[dict[str, Any]]:
    return [{"step": step - 1, "step_seconds": 2.0}, {"step": step, "step_seconds": 2.0}]


def report(every: list[tuple[int, int]], seconds: float = 4.0) -> list[dict[str, Any]]:
    """Rank 0's, of ranks that were seen so often, of that in a collective."""
    looks, waits = ([each[place] for each in every] for place in (0, 1))
    gathered = iter([looks, waits, looks, waits])
    found = Stragglers(World(0, len(every)), SimpleNamespace(all_gather_ints=lambda value: next(gathered)), seconds)  # type: ignore[arg-type]
    found.looks, found.waits = every[0]
    first = found.report(rows(2))
    return first or found.report(rows(4))


def test_the_rank_that_others_wait_for_is_named() -> None:
    (row,) = report([(100, 40), (100, 10), (100, 50)])
    assert row["busy_seconds"] == [1.2, 1.8, 1.0]
    assert row["event"].startswith(
        "step 2: rank 1 is slow: it works 1.800 s of a step's 2.000 s, the median of the others"
    )
    assert "others 1.100 s; logs/rank_00001.log" in row["event"]


def test_ranks_that_wait_alike_are_not_named() -> None:
    (row,) = report([(100, 40), (200, 60), (100, 42)])
    assert "event" not in row
    assert row["busy_seconds"] == pytest.approx([1.2, 1.4, 1.16])


def test_looks_add_up_until_it_is_time() -> None:
    (row,) = report([(10, 4), (10, 5)], seconds=8.0)
    assert row["step"] == 4
    assert row["busy_seconds"] == pytest.approx([1.2, 1.0])


def test_one_rank_has_nobody_to_wait_for() -> None:
    alone = Stragglers(World(), SimpleNamespace(all_gather_ints=lambda value: [value]), 1.0)  # type: ignore[arg-type]
    assert alone.report(rows(2)) == []


def test_slowest() -> None:
    assert slowest([0.5, 0.9, 0.6, 0.8]) == (1, 0.6)
