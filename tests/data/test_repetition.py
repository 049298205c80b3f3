"""Repetitions computed from the plan match counted samples, also after a resume."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.data.repetition import REPORTED_EPOCHS, Repetition, find_repetitions
from tests.data.test_plan import plans

END = 200


def count_one_by_one(plan) -> list[Repetition]:
    """Find the repetitions by counting samples."""
    source_ids, _ = plan.assign(np.arange(END))
    repetitions = []
    for number, source in enumerate(plan.sources):
        num_consumed = np.cumsum(source_ids == number)  # after each sample
        for times in REPORTED_EPOCHS:
            reached = np.flatnonzero(num_consumed >= times * source.samples_per_epoch)
            if len(reached):
                repetitions.append(Repetition(int(reached[0]) + 1, source.name, times))
    return sorted(repetitions)


@settings(max_examples=30)
@given(plans(), st.integers(0, END))
def test_repetitions_match_counted_samples(plan, middle) -> None:
    plan = replace(plan, skip=())
    repetitions = find_repetitions(plan, 0, END)
    assert repetitions == count_one_by_one(plan)
    before, after = find_repetitions(plan, 0, middle), find_repetitions(plan, middle, END)
    assert sorted([*before, *after]) == repetitions, "an interrupted run reports each repetition once"


def test_message_of_a_repetition() -> None:
    assert str(Repetition(42, "web", 1)).startswith("data: web has been read once in full, up to sample 42; ")
    assert "has been read 10 times in full" in str(Repetition(420, "web", 10))
