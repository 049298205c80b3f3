"""When a source has been read in full is found from the plan: as by counting samples, and the same after a resume."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.data.repetition import REPORTED_EPOCHS, Repetition, find_repetitions
from tests.data.test_plan import plans

END = 200


def counted(plan) -> list[Repetition]:
    """By reading one sample after the other."""
    owners, _ = plan.assign(np.arange(END))
    found = []
    for number, source in enumerate(plan.sources):
        taken = np.cumsum(owners == number)  # with each sample
        for times in REPORTED_EPOCHS:
            done = np.flatnonzero(taken >= times * source.epoch_samples)
            if len(done):
                found.append(Repetition(int(done[0]) + 1, source.name, times))
    return sorted(found)


@settings(max_examples=30)
@given(plans(), st.integers(0, END))
def test_repetitions_are_those_of_counting_samples(plan, middle) -> None:
    plan = replace(plan, skip=())
    found = find_repetitions(plan, 0, END)
    assert found == counted(plan)
    before, after = find_repetitions(plan, 0, middle), find_repetitions(plan, middle, END)
    assert sorted([*before, *after]) == found, "a run that stops and goes on names each once"


def test_an_epoch_is_every_window_once() -> None:
    assert str(Repetition(42, "web", 1)).startswith("data: web has been read once in full, up to sample 42; ")
    assert "has been read 10 times in full" in str(Repetition(420, "web", 10))
