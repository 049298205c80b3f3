"""find_repetitions computes from the plan when a source has been read 1, 2, ... times in full.

The tests compare it with a count of the samples, without and with a resume.
"""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_llm.data.repetition import REPORTED_EPOCHS, Repetition, find_repetitions
from tests.data.test_plan import draw_plans

END_SAMPLE = 200


def count_one_by_one(plan) -> list[Repetition]:
    """Return the repetitions, found by a count of the samples."""
    source_ids, _ = plan.assign(np.arange(END_SAMPLE))
    repetitions = []
    for source_index, source in enumerate(plan.sources):
        num_consumed = np.cumsum(source_ids == source_index)  # after each sample
        for epochs in REPORTED_EPOCHS:
            samples = np.flatnonzero(num_consumed >= epochs * source.samples_per_epoch)
            if len(samples):
                repetitions.append(Repetition(int(samples[0]) + 1, source.name, epochs))
    return sorted(repetitions)


@settings(max_examples=30)
@given(draw_plans(), st.integers(0, END_SAMPLE))
def test_repetitions_match_counted_samples(plan, resume_sample) -> None:
    plan = replace(plan, skip=())
    repetitions = find_repetitions(plan, first_sample=0, end_sample=END_SAMPLE)
    assert repetitions == count_one_by_one(plan)
    before = find_repetitions(plan, first_sample=0, end_sample=resume_sample)
    after = find_repetitions(plan, resume_sample, END_SAMPLE)
    assert sorted([*before, *after]) == repetitions, "a resumed run does not report each repetition once"


def test_message_of_a_repetition() -> None:
    assert str(Repetition(sample=42, source="web", num_reads=1)).startswith(
        "data: web has been read once in full, up to sample 42; "
    )
    assert "has been read 10 times in full" in str(Repetition(sample=420, source="web", num_reads=10))
