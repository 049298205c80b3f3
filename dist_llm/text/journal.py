"""The record beside an unfinished corpus of what is durable: one JSON line at a time, each synced before the next."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

JOURNAL = "progress.jsonl"


class Journal:
    """A header, which says what the run was to do, and records. A line torn by a crash counts as not written."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / JOURNAL

    @property
    def useful(self) -> bool:
        """Whether it has a record after the header: something to go on from."""
        return len(list(islice(self._lines(), 2))) == 2

    def read(self) -> list[dict[str, Any]]:
        """All whole lines from the start, header first; none where there is no journal. About 1 kB for 8 MB of text."""
        return list(self._lines())

    def _lines(self) -> Iterator[dict[str, Any]]:
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

    def begin(self, lines: list[dict[str, Any]]) -> None:
        """Replace the journal by these lines, all or nothing."""
        fresh = self.path.with_suffix(".tmp")
        self._write(fresh, "wb", lines)
        fresh.rename(self.path)

    def append(self, record: dict[str, Any]) -> None:
        self._write(self.path, "ab", [record])

    def _write(self, path: Path, mode: str, lines: list[dict[str, Any]]) -> None:
        with path.open(mode) as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
