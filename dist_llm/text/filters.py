"""The filters of `prepare --filter`, one after the other; each may shorten a document or take it away."""

from collections.abc import Sequence

from dist_llm.text import c4, gopher
from dist_llm.text.report import RemovalCounts, TextCount

FILTERS = {"gopher": (gopher.clean, gopher.RULES), "c4": (c4.clean, c4.RULES)}


class Filters:
    """Calls the filters in the order given."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __call__(self, text: str, removed: RemovalCounts) -> str | None:
        """What is left of a document that is not empty, or None; what goes is counted in `removed`."""
        left: str | None = text
        for name in self.names:
            if left is not None:
                left = FILTERS[name][0](left, removed)
        return left

    def zero_counts(self) -> RemovalCounts:
        """A zero for each rule, so that a report shows also what removed nothing."""
        return RemovalCounts({f"{name}.{rule}": TextCount() for name in self.names for rule in FILTERS[name][1]})
