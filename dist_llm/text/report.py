"""What prepare left out and why: counts per rule, in the corpus as `report.json`."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_llm.errors import DataError

REPORT = "report.json"
FORMAT = "dist_llm prepare report 1"


@dataclass
class Removed:
    """What one rule took away: whole documents, single lines, and the bytes of UTF-8 of both."""

    documents: int = 0
    lines: int = 0
    bytes: int = 0


class Removals(dict[str, Removed]):
    """Counts per rule, in the order in which the rules look."""

    def add(self, rule: str, documents: int = 0, lines: int = 0, bytes: int = 0) -> None:
        entry = self.setdefault(rule, Removed())
        entry.documents += documents
        entry.lines += lines
        entry.bytes += bytes

    def merge(self, other: Mapping[str, Removed]) -> None:
        for rule, removed in other.items():
            self.add(rule, **asdict(removed))


@dataclass
class Report:
    """Where each row of the input went: bad, empty, removed by a rule, or kept."""

    options: dict[str, Any]  # those that shape the corpus
    rows: int = 0
    bad_rows: int = 0
    empty_documents: int = 0
    kept: Removed = field(default_factory=Removed)
    removed: Removals = field(default_factory=Removals)

    def add(self, other: "Report") -> None:
        """Count in what another part reports."""
        self.rows += other.rows
        self.bad_rows += other.bad_rows
        self.empty_documents += other.empty_documents
        self.kept = Removed(self.kept.documents + other.kept.documents, 0, self.kept.bytes + other.kept.bytes)
        self.removed.merge(other.removed)

    def save(self, directory: Path) -> None:
        """Write it durably."""
        with (directory / REPORT).open("w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, **asdict(self)}, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def load(directory: Path) -> "Report":
        """Read what `save` wrote. Raises DataError where it is missing or malformed."""
        path = directory / REPORT
        try:
            fields = json.loads(path.read_bytes())
            if fields.pop("format") != FORMAT:
                raise ValueError(f"not of format '{FORMAT}'")
            removed = Removals({rule: Removed(**counts) for rule, counts in fields.pop("removed").items()})
            return Report(kept=Removed(**fields.pop("kept")), removed=removed, **fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: cannot be read: {error!r}. Prepare the part again.") from None

    def lines(self) -> list[str]:
        """One line per rule, for people."""
        return [
            f"  {rule} removed {each.documents:,} documents, {each.lines:,} lines, {each.bytes:,} bytes"
            for rule, each in self.removed.items()
        ]
