"""The journal of an unfinished corpus: JSON lines that record what is durable. Each line is synced before the next."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

JOURNAL_FILE = "progress.jsonl"


class Journal:
    """A header with the options of the run, then records. `read` ignores an incomplete last line."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / JOURNAL_FILE

    @property
    def has_records(self) -> bool:
        """Whether a run can resume: there is a record after the header."""
        return len(list(islice(self._iter_lines(), 2))) == 2

    def read(self) -> list[dict[str, Any]]:
        """Return the valid lines, header first; an empty list without a journal. About 1 kB for 8 MB of text."""
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
        temporary = self.path.with_suffix(".tmp")
        self._write(temporary, "wb", lines)
        temporary.rename(self.path)

    def append(self, record: dict[str, Any]) -> None:
        self._write(self.path, "ab", [record])

    def _write(self, path: Path, mode: str, lines: list[dict[str, Any]]) -> None:
        with path.open(mode) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
