"""Predict from the sample plan at which sample a run has read a source 1, 4 and 10 times.

Training logs these repetitions at the start. A resumed run reports only the repetitions that are still ahead.
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
    """The samples before number `sample` read all text of a source `num_reads` times."""

    sample: int
    source: str
    num_reads: int

    def __str__(self) -> str:
        count = "once" if self.num_reads == 1 else f"{self.num_reads} times"
        return (
            f"data: {self.source} has been read {count} in full, up to sample {self.sample}; {ADVICE[self.num_reads]}"
        )


def find_repetitions(plan: SamplePlan, first_sample: int, end_sample: int) -> list[Repetition]:
    """Return the repetitions after `first_sample` and up to `end_sample`, sorted."""
    repetitions = []
    for source_id, source in enumerate(plan.sources):
        name = source.name or str(source.corpus.directory)
        for num_reads in REPORTED_EPOCHS:
            threshold = num_reads * source.samples_per_epoch
            if plan.count_consumed(first_sample)[source_id] >= threshold:
                continue
            if plan.count_consumed(end_sample)[source_id] < threshold:
                continue
            samples = range(first_sample, end_sample)
            index = bisect_left(samples, threshold, key=lambda sample, s=source_id: plan.count_consumed(sample)[s])  # type: ignore[misc]
            repetitions.append(Repetition(first_sample + index, name, num_reads))
    return sorted(repetitions)
