"""The report of prepare: counts of the input, and of removed text by rule, in `report.json`."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_llm.errors import DataError
from dist_llm.io.atomic import write_durably

REPORT_FILE = "report.json"
FORMAT = "dist_llm prepare report 1"


@dataclass
class TextCount:
    """Text that one rule removed: documents, lines, and bytes of UTF-8."""

    documents: int = 0
    lines: int = 0
    bytes: int = 0


class RemovalCounts(dict[str, TextCount]):
    """Counts per rule, in the order in which the rules are applied."""

    def add(self, rule: str, documents: int = 0, lines: int = 0, bytes: int = 0) -> None:
        entry = self.setdefault(rule, TextCount())
        entry.documents += documents
        entry.lines += lines
        entry.bytes += bytes

    def merge(self, other: Mapping[str, TextCount]) -> None:
        for rule, removed in other.items():
            self.add(rule, **asdict(removed))


@dataclass
class FileCount:
    """A number of files and their bytes on the disk."""

    files: int = 0
    bytes: int = 0


class InputTable(dict[str, dict[str, FileCount]]):
    """Counts of files by outcome ("read", or "skipped: " and the reason) and suffix."""

    def add(self, outcome: str, path: Path, bytes: int, files: int = 1) -> None:
        kind = "folder" if path.is_dir() else "".join(path.suffixes[-2:]).lower() or "no suffix"
        amount = self.setdefault(outcome, {}).setdefault(kind, FileCount())
        amount.files += files
        amount.bytes += bytes

    def mark_unreadable(self, path: Path, bytes: int) -> None:
        """Count a file as unreadable that was counted as read before."""
        self.add("read", path, -bytes, -1)
        self.add("skipped: unreadable", path, bytes)

    def lines(self) -> list[str]:
        """Format the table."""
        rows = [
            (outcome, kind, f"{each.files:,}", f"{each.bytes:,}")
            for outcome, kinds in sorted(self.items())
            for kind, each in sorted(kinds.items())
            if each.files
        ]
        table = [("input", "suffix", "files", "bytes"), *rows]
        a, b, c, d = (max(len(row[column]) for row in table) for column in range(4))
        return [f"  {w:{a}}  {x:{b}}  {y:>{c}}  {z:>{d}}" for w, x, y, z in table] if rows else []


@dataclass
class Report:
    """The outcome of each row of the input: bad, empty, removed by a rule, or kept."""

    options: dict[str, Any]  # options that decide the content of the corpus
    rows: int = 0
    bad_rows: int = 0
    empty_documents: int = 0
    kept: TextCount = field(default_factory=TextCount)
    removed: RemovalCounts = field(default_factory=RemovalCounts)
    bad_bytes: int = 0  # of bad rows
    inputs: InputTable = field(default_factory=InputTable)
    unreadable: dict[str, tuple[int, str]] = field(
        default_factory=dict
    )  # bytes and reason, by path, of files that failed while they were read
    warnings: list[str] = field(default_factory=list)

    def add(self, other: "Report") -> None:
        """Add the counts of another part."""
        self.rows += other.rows
        self.bad_rows += other.bad_rows
        self.bad_bytes += other.bad_bytes
        self.warnings += [each for each in other.warnings if each not in self.warnings]
        if not self.inputs:  # all parts list the same files
            self.inputs = other.inputs
        for path, (size, reason) in other.unreadable.items():
            if path not in self.unreadable and other.inputs is not self.inputs:
                self.inputs.mark_unreadable(Path(path), size)
            self.unreadable[path] = (size, reason)
        self.empty_documents += other.empty_documents
        self.kept = TextCount(self.kept.documents + other.kept.documents, 0, self.kept.bytes + other.kept.bytes)
        self.removed.merge(other.removed)

    def save(self, directory: Path) -> None:
        """Write the report durably."""
        content = json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"
        write_durably(directory / REPORT_FILE, content.encode())

    @staticmethod
    def load(directory: Path) -> "Report":
        """Read the report that `save` wrote. Raises DataError if it is missing or malformed."""
        path = directory / REPORT_FILE
        try:
            fields = json.loads(path.read_bytes())
            if fields.pop("format") != FORMAT:
                raise ValueError(f"not of format '{FORMAT}'")
            removed = RemovalCounts({rule: TextCount(**counts) for rule, counts in fields.pop("removed").items()})
            inputs = InputTable(
                {
                    outcome: {kind: FileCount(**amount) for kind, amount in kinds.items()}
                    for outcome, kinds in fields.pop("inputs", {}).items()
                }
            )
            unreadable = {path: (size, reason) for path, (size, reason) in fields.pop("unreadable", {}).items()}
            fields |= {"inputs": inputs, "unreadable": unreadable}
            return Report(kept=TextCount(**fields.pop("kept")), removed=removed, **fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: cannot be read: {error!r}. Prepare the part again.") from None

    def lines(self) -> list[str]:
        """Format the table of the input, and one line per rule."""
        return self.inputs.lines() + [
            f"  {rule} removed {each.documents:,} documents, {each.lines:,} lines, {each.bytes:,} bytes"
            for rule, each in self.removed.items()
        ]
