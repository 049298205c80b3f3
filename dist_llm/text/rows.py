"""A row of the input and the document in it, and the count of what one pass has met.

A row that is no document (malformed UTF-8 or JSON, a text key that is missing or not a string) is
skipped, counted and located in the `Tally`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dist_llm.errors import DataError
from dist_llm.text.share import WHOLE, Share
from dist_llm.text.tokenizer import well_formed

LOCATIONS_KEPT = 5
ENOUGH_ROWS = 10_000


@dataclass(frozen=True)
class Keys:
    """Where in a row its text is, and the prompt that goes before it."""

    text: str = "text"
    prompt: str | None = None

    @property
    def all(self) -> list[str]:
        return [self.text, *([self.prompt] if self.prompt else [])]


@dataclass(frozen=True)
class Document:
    """One text, always encodable as UTF-8, and the `file:line` it came from; it begins with a prompt of so many
    characters."""

    text: str
    origin: str
    prompt_chars: int = 0


@dataclass
class Tally:
    """What one pass over the sources has met so far."""

    max_bad_rate: float
    share: Share = WHOLE
    rows_met: int = 0  # those of other parts included
    rows: int = 0
    bad_rows: int = 0
    bytes_read: int = 0  # of files as they lie on the disk, compressed or not
    locations: list[str] = field(default_factory=list)

    def takes_next(self) -> bool:
        """Count one more row of the input, and say whether it is this part's to read."""
        self.rows_met += 1
        return self.share.has_row(self.rows_met)

    def bad(self, location: str, reason: str) -> None:
        """Count a bad row. Raises DataError once so many of so many rows were bad that it is no accident."""
        self.rows += 1
        self.bad_rows += 1
        if len(self.locations) < LOCATIONS_KEPT:
            self.locations.append(f"{location}: {reason}")
        if self.rows >= ENOUGH_ROWS:
            self.check()

    def check(self) -> None:
        """Raise DataError if the share of bad rows is above the limit."""
        if self.bad_rows > self.max_bad_rate * self.rows:
            raise DataError(
                f"{self.bad_rows:,} of {self.rows:,} rows are bad, more than --max-bad-rate {self.max_bad_rate:g}. "
                "Mend them, check --text-key, or raise the rate. The first:\n  " + "\n  ".join(self.locations)
            )


def row_document(row: Any, keys: Keys, origin: str, tally: Tally) -> Iterator[Document]:
    """The document of a row; none, and a bad row, where it has no text."""
    found: list[str] = []
    for key in keys.all:
        text = row.get(key) if isinstance(row, dict) else None
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError:
                return tally.bad(origin, "not UTF-8")
        if not isinstance(text, str):
            missing = isinstance(row, dict) and key not in row
            return tally.bad(origin, f"no key '{key}'" if missing else f"no string under '{key}'")
        found.append(well_formed(text))
    tally.rows += 1
    text, prompt = found[0], "".join(found[1:])
    yield Document(prompt + text if text else "", origin, len(prompt))
