"""Compute from the plan when a run will have read a source 1, 4 and 10 times.

It depends only on sample numbers, so a resumed run reports only repetitions that are still ahead.
"""

from bisect import bisect_left
from dataclasses import dataclass

from dist_llm.data.plan import SamplePlan

REPORTED_EPOCHS = (1, 4, 10)
ADVICE = {
    1: "its text repeats from here on",
    4: "further repetition helps less than new text (Muennighoff et al. 2023)",
    10: "further repetition helps little; add text, or lower its weight",
}


@dataclass(frozen=True, order=True)
class Repetition:
    """Before sample `sample`, the source has been read `times` times completely."""

    sample: int
    source: str
    times: int

    def __str__(self) -> str:
        count = "once" if self.times == 1 else f"{self.times} times"
        return f"data: {self.source} has been read {count} in full, up to sample {self.sample}; {ADVICE[self.times]}"


def find_repetitions(plan: SamplePlan, first: int, end: int) -> list[Repetition]:
    """Return the repetitions after sample `first` and up to `end`, sorted."""
    repetitions = []
    for number, source in enumerate(plan.sources):
        name = source.name or str(source.corpus.directory)
        for times in REPORTED_EPOCHS:
            threshold = times * source.epoch_samples
            if plan.count_consumed(first)[number] >= threshold or plan.count_consumed(end)[number] < threshold:
                continue
            samples = range(first, end)
            index = bisect_left(samples, threshold, key=lambda sample, n=number: plan.count_consumed(sample)[n])  # type: ignore[misc]
            repetitions.append(Repetition(first + index, name, times))
    return sorted(repetitions)
