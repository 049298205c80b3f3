"""The journal of an unfinished corpus, from which an interrupted `prepare` resumes.

It consists of JSON lines: a header with the options of the run, then one record per resume point. A line is on the disk
before the next line is written.
"""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dist_llm.io.atomic import open_durably, replace_file

JOURNAL_FILE = "progress.jsonl"


class Journal:
    """Reads and appends the lines. An incomplete last line, which a killed run may leave, is ignored."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / JOURNAL_FILE

    @property
    def has_records(self) -> bool:
        """Whether a run can resume: the journal has a record after the header."""
        return len(list(islice(self._iter_lines(), 2))) == 2

    def read(self) -> list[dict[str, Any]]:
        """Return the valid lines, header first; [] if there is no journal. The journal takes 1 kB per 8 MB of text."""
        return list(self._iter_lines())

    def _iter_lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    return
                if not isinstance(record, dict):
                    return
                yield record

    def rewrite(self, lines: list[dict[str, Any]]) -> None:
        """Replace the journal by these lines atomically."""
        replace_file(self.path, b"".join(map(_format_line, lines)))

    def append(self, record: dict[str, Any]) -> None:
        with open_durably(self.path, "ab") as file:
            file.write(_format_line(record))


def _format_line(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode() + b"\n"
