"""The quality filters of `prepare --filter`. A filter may shorten or remove a document."""

from collections.abc import Sequence

from dist_llm.text import c4, gopher
from dist_llm.text.report import RemovalCounts, TextCount

# name -> (filter function, names of its rules)
FILTERS = {"gopher": (gopher.filter_document, gopher.RULES), "c4": (c4.filter_page, c4.RULES)}


class FilterChain:
    """Applies the filters in the given order."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def __call__(self, text: str, removed: RemovalCounts) -> str | None:
        """Return the remaining text of a non-empty document, or None. Count removals in `removed`."""
        remaining: str | None = text
        for name in self.names:
            if remaining is not None:
                apply_filter, _ = FILTERS[name]
                remaining = apply_filter(remaining, removed)
        return remaining

    def build_zero_counts(self) -> RemovalCounts:
        """Return zero counts for each rule, so that a report also lists the rules that removed nothing."""
        return RemovalCounts({f"{name}.{rule}": TextCount() for name in self.names for rule in FILTERS[name][1]})
