"""When a run has read a source 1, 4 and 10 times in full, from its plan.

A function of sample numbers alone, so a resumed run names only those that are still to come.
"""

from bisect import bisect_left
from dataclasses import dataclass

from dist_llm.data.plan import Plan

TIMES = (1, 4, 10)
NOTES = {
    1: "from here on its text repeats",
    4: "more repetition gives less than new text would (Muennighoff et al. 2023)",
    10: "more repetition gives little; add text, or lower its weight",
}


@dataclass(frozen=True, order=True)
class Repetition:
    """Before sample number `sample` the source has been read `times` in full."""

    sample: int
    source: str
    times: int

    def __str__(self) -> str:
        count = "once" if self.times == 1 else f"{self.times} times"
        return f"data: {self.source} has been read {count} in full, up to sample {self.sample}; {NOTES[self.times]}"


def find_repetitions(plan: Plan, first: int, end: int) -> list[Repetition]:
    """Those after sample `first` and up to `end`, in their order."""
    found = []
    for number, source in enumerate(plan.sources):
        name = source.name or str(source.corpus.directory)
        for times in TIMES:
            wanted = times * source.epoch_samples
            if plan.taken(first)[number] >= wanted or plan.taken(end)[number] < wanted:
                continue
            between = range(first, end)
            place = bisect_left(between, wanted, key=lambda sample, n=number: plan.taken(sample)[n])  # type: ignore[misc]
            found.append(Repetition(first + place, name, times))
    return sorted(found)
