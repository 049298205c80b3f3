"""The filters of `prepare --filter`, applied in order; each may shorten or remove a document."""

from collections.abc import Sequence

from dist_llm.text import c4, gopher
from dist_llm.text.report import RemovalCounts, TextCount

FILTERS = {"gopher": (gopher.clean, gopher.RULES), "c4": (c4.clean, c4.RULES)}


class Filters:
    """Applies the filters in the given order."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __call__(self, text: str, removed: RemovalCounts) -> str | None:
        """Return the remaining text of a non-empty document, or None; removals are counted in `removed`."""
        left: str | None = text
        for name in self.names:
            if left is not None:
                left = FILTERS[name][0](left, removed)
        return left

    def zero_counts(self) -> RemovalCounts:
        """Return a zero for each rule, so that a report also shows rules that removed nothing."""
        return RemovalCounts({f"{name}.{rule}": TextCount() for name in self.names for rule in FILTERS[name][1]})
