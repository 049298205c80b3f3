"""Read the document in a row of the input, and count the rows of a pass.

A bad row (malformed UTF-8 or JSON, a text key that is missing or not a string) is skipped. The `Tally` counts it and
records its location.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_llm.errors import DataError
from dist_llm.text.corpus_part import SINGLE_PART, CorpusPart
from dist_llm.text.tokenizer import to_well_formed

MAX_LOCATIONS = 5
MIN_ROWS = 10_000
PARAGRAPH_BREAK = "\n\n"
BLANK_LINES = "blank-lines"  # a separator of one or more empty lines


class UnreadableError(Exception):
    """A file cannot be read; the message gives the reason."""


@dataclass(frozen=True)
class RowKeys:
    """The keys of the text and of its prompt in a row, and the separator of documents in a text file.

    `a.b` is the key b of the object under a, unless the row has a key named `a.b`.
    """

    text: str = "text"
    prompt: str | None = None
    separator: str | None = None

    @property
    def all(self) -> list[str]:
        return [self.text, *([self.prompt] if self.prompt else [])]


@dataclass(frozen=True)
class Document:
    """A text, always encodable as UTF-8, and its origin `file:line`. The text begins with a prompt of `prompt_chars`
    characters."""

    text: str
    origin: str
    prompt_chars: int = 0


@dataclass
class Tally:
    """The counts of one pass over the inputs, so far. Field names are keys of the journal."""

    max_bad_rate: float
    part: CorpusPart = SINGLE_PART
    rows_met: int = 0  # including the rows of other parts
    rows: int = 0
    bad_rows: int = 0
    bytes_read: int = 0  # of files on the disk, before decompression
    locations: list[str] = field(default_factory=list)
    row_bytes: int = 0  # of all rows of this part
    bad_bytes: int = 0  # of bad rows
    skip_unreadable: bool = False
    unreadable: dict[str, tuple[int, str]] = field(default_factory=dict)  # bytes and reason, by path

    def claim_next_row(self) -> bool:
        """Count one more row of the input. Return whether this part reads it."""
        self.rows_met += 1
        return self.part.owns_row(self.rows_met)

    def count_good(self, size: int) -> None:
        """Count a good row of `size` bytes."""
        self.rows += 1
        self.row_bytes += size

    def skip_file(self, path: Path, size: int, reason: str) -> None:
        """Count an unreadable file. Raises DataError unless the user allows to skip such files."""
        self.unreadable[str(path)] = (size, reason)
        self._check_unreadable()

    def count_bad(self, location: str, reason: str, size: int) -> None:
        """Count a bad row. Raises DataError if the rate is above the limit after at least MIN_ROWS rows."""
        self.row_bytes += size
        self.bad_bytes += size
        self.rows += 1
        self.bad_rows += 1
        if len(self.locations) < MAX_LOCATIONS:
            self.locations.append(f"{location}: {reason}")
        if self.rows >= MIN_ROWS:
            self.check()

    def check(self) -> None:
        """Raise DataError if the rate of bad rows, or of their bytes, is above the limit."""
        self._check_unreadable()
        for bad, all_of_them, unit in (
            (self.bad_rows, self.rows, "rows are bad"),
            (self.bad_bytes, self.row_bytes, "bytes are in bad rows"),
        ):
            if bad > self.max_bad_rate * all_of_them:
                raise DataError(
                    f"{bad:,} of {all_of_them:,} {unit}, more than --max-bad-rate {self.max_bad_rate:g}. "
                    "Fix them, check --text-key, or raise the rate. The first:\n  " + "\n  ".join(self.locations)
                )

    def _check_unreadable(self) -> None:
        if self.unreadable and not self.skip_unreadable:
            path, (_, reason) = next(iter(self.unreadable.items()))
            raise DataError(
                f"{path}: cannot be read: {reason}. Fix it or download it again, leave it out with --exclude, or skip "
                "unreadable files with --skip-unreadable."
            )


def read_row(row: Any, keys: RowKeys, origin: str, tally: Tally, size: int | None = None) -> Iterator[Document]:
    """Yield the document of a row of `size` bytes (None: the size of its texts). Count a row without text as bad."""
    texts: list[str] = []
    if size is None:
        values = [_get_value(row, key) for key in keys.all]
        size = sum(len(value) for value in values if isinstance(value, str | bytes))
    for key in keys.all:
        text = _get_value(row, key)
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError:
                return tally.count_bad(origin, "not UTF-8", size)
        if not isinstance(text, str):
            missing = text is None and isinstance(row, dict) and key not in row
            return tally.count_bad(origin, f"no key '{key}'" if missing else f"no string under '{key}'", size)
        texts.append(to_well_formed(text))
    tally.count_good(size)
    text, prompt = texts[0], "".join(texts[1:])
    yield Document(prompt + text if text else "", origin, len(prompt))


def _get_value(row: Any, key: str) -> Any:
    """Return the value of a key, which may be nested. A list of strings is joined to one text of paragraphs."""
    if not isinstance(row, dict):
        return None
    if key not in row:
        first, _, rest = key.partition(".")
        return _get_value(row.get(first), rest) if rest else None
    value = row[key]
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return PARAGRAPH_BREAK.join(value)
    return value
