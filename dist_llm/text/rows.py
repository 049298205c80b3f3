"""Read the document of an input row (a JSON object, a table row or a separated text), and track the rows of a run.

A bad row has malformed UTF-8 or JSON, or no string under the text key. It is skipped. `RowTracker` counts the bad rows
and records the location of the first ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_llm.errors import DataError
from dist_llm.text.corpus_part import SINGLE_PART, CorpusPart
from dist_llm.text.tokenizer import to_well_formed

MAX_LOCATIONS = 5  # maximum number of bad rows whose location is recorded
MIN_ROWS = 10_000  # rows to read before a high rate of bad rows stops the run
PARAGRAPH_BREAK = "\n\n"
BLANK_LINES = "blank-lines"  # value of --separator: one or more empty lines separate documents


class UnreadableError(Exception):
    """A file cannot be read; the message gives the reason."""


@dataclass(frozen=True)
class RowFormat:
    """How to find the documents of a file: the keys of a row, or the separator of a text file.

    A row has its text under `text_key` and its prompt under `prompt_key`. `a.b` is the key `b` of the object under
    `a`, unless the row has a key named `a.b`.
    """

    text_key: str = "text"
    prompt_key: str | None = None
    separator: str | None = None

    @property
    def key_by_option(self) -> dict[str, str]:
        """The key of the text and, if there is one, the key of the prompt, by the options that set them."""
        return {"--text-key": self.text_key, **({"--prompt-key": self.prompt_key} if self.prompt_key else {})}

    @property
    def keys(self) -> list[str]:
        """The key of the text and, if there is one, the key of the prompt."""
        return list(self.key_by_option.values())


@dataclass(frozen=True)
class TextDocument:
    """The text of one document."""

    text: str  # can always be encoded as UTF-8
    origin: str  # `file:line`
    prompt_chars: int = 0  # length of the prompt at the start of the text


@dataclass
class RowTracker:
    """Assigns the rows of one pass over the inputs to a part, counts them, and limits the rate of bad rows.

    Field names are journal keys.
    """

    max_bad_rate: float
    part: CorpusPart = SINGLE_PART
    rows_met: int = 0  # rows of all parts
    rows: int = 0  # good and bad rows of this part
    bad_rows: int = 0
    bytes_read: int = 0  # bytes read from the disk, before decompression
    locations: list[str] = field(default_factory=list)  # location and reason of the first bad rows
    row_bytes: int = 0  # size of the rows of this part
    bad_bytes: int = 0  # size of the bad rows
    skip_unreadable: bool = False
    unreadable: dict[str, tuple[int, str]] = field(default_factory=dict)  # {path: (size in bytes, reason)}

    def advance_to_next_row(self) -> bool:
        """Advance to the next row of the input, and count it. Return whether this part reads it."""
        self.rows_met += 1
        return self.part.owns_row(self.rows_met)

    def count_good(self, row_bytes: int) -> None:
        """Count a good row of `row_bytes` bytes."""
        self.rows += 1
        self.row_bytes += row_bytes

    def skip_file(self, path: Path, file_bytes: int, reason: str) -> None:
        """Count an unreadable file. Raises DataError unless `skip_unreadable` is set."""
        self.unreadable[str(path)] = (file_bytes, reason)
        self._check_unreadable()

    def count_bad(self, location: str, reason: str, row_bytes: int) -> None:
        """Count a bad row. Raises DataError if the rate is above the limit after at least MIN_ROWS rows."""
        self.row_bytes += row_bytes
        self.bad_bytes += row_bytes
        self.rows += 1
        self.bad_rows += 1
        if len(self.locations) < MAX_LOCATIONS:
            self.locations.append(f"{location}: {reason}")
        if self.rows >= MIN_ROWS:
            self.check()

    def check(self) -> None:
        """Raise DataError if the fraction of bad rows, or of their bytes, is above the limit."""
        self._check_unreadable()
        for num_bad, total, description in (
            (self.bad_rows, self.rows, "rows are bad"),
            (self.bad_bytes, self.row_bytes, "bytes are in bad rows"),
        ):
            if num_bad > self.max_bad_rate * total:
                raise DataError(
                    f"{num_bad:,} of {total:,} {description}, more than --max-bad-rate {self.max_bad_rate:g}. "
                    "Fix them, check --text-key, or raise the rate. The first:\n  " + "\n  ".join(self.locations)
                )

    def _check_unreadable(self) -> None:
        if self.unreadable and not self.skip_unreadable:
            path, (_, reason) = next(iter(self.unreadable.items()))
            raise DataError(
                f"{path}: cannot be read: {reason}. Fix it or download it again, leave it out (in a folder, with "
                "--exclude), or skip unreadable files with --skip-unreadable."
            )


def read_row(
    row: Any, row_format: RowFormat, origin: str, row_tracker: RowTracker, row_bytes: int | None = None
) -> Iterator[TextDocument]:
    """Yield the document of a row, or count the row as bad and yield nothing.

    `row_bytes` is the size of the row; None: use the size of its texts.
    """
    texts: list[str] = []
    if row_bytes is None:
        values = [_get_value(row, key) for key in row_format.keys]
        row_bytes = sum(len(value) for value in values if isinstance(value, str | bytes))
    for key in row_format.keys:
        text = _get_value(row, key)
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError:
                return row_tracker.count_bad(origin, "not UTF-8", row_bytes)
        if not isinstance(text, str):
            is_missing = text is None and isinstance(row, dict) and key not in row
            reason = f"no key '{key}'" if is_missing else f"no string under '{key}'"
            return row_tracker.count_bad(origin, reason, row_bytes)
        texts.append(to_well_formed(text))
    row_tracker.count_good(row_bytes)
    text, prompt = texts[0], "".join(texts[1:])
    yield TextDocument(prompt + text if text else "", origin, len(prompt))


def _get_value(row: Any, key: str) -> Any:
    """Return the value of a key, which may be nested; None if it is missing. Join a list of strings as paragraphs."""
    if not isinstance(row, dict):
        return None
    if key not in row:
        outer_key, _, inner_key = key.partition(".")
        return _get_value(row.get(outer_key), inner_key) if inner_key else None
    value = row[key]
    if isinstance(value, list) and value and all(isinstance(paragraph, str) for paragraph in value):
        return PARAGRAPH_BREAK.join(value)
    return value
