"""The report of `prepare` in `report.json`: counts of the input, and counts of the removed text by rule."""

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
    """An amount of text, such as the text that one rule removed: documents, lines, and UTF-8 bytes."""

    documents: int = 0
    lines: int = 0
    bytes: int = 0


class RemovalCounts(dict[str, TextCount]):
    """The removed text by rule, in the order in which the rules are applied."""

    def add(self, rule: str, documents: int = 0, lines: int = 0, bytes: int = 0) -> None:
        """Add removed text to the counts of a rule."""
        entry = self.setdefault(rule, TextCount())
        entry.documents += documents
        entry.lines += lines
        entry.bytes += bytes

    def merge(self, other: Mapping[str, TextCount]) -> None:
        """Add all counts of `other`."""
        for rule, removed in other.items():
            self.add(rule, **asdict(removed))


@dataclass
class FileCount:
    """A number of files, and their total size on the disk."""

    files: int = 0
    bytes: int = 0


class InputFileCounts(dict[str, dict[str, FileCount]]):
    """Counts of input files by outcome ("read" or "skipped: REASON") and by suffix."""

    def add(self, outcome: str, path: Path, bytes: int, files: int = 1) -> None:
        """Count a file of `bytes` bytes, or `files` files. The suffix of `path` selects the count."""
        suffix = "folder" if path.is_dir() else "".join(path.suffixes[-2:]).lower() or "no suffix"
        count = self.setdefault(outcome, {}).setdefault(suffix, FileCount())
        count.files += files
        count.bytes += bytes

    def mark_unreadable(self, path: Path, bytes: int) -> None:
        """Move a file from "read" to "skipped: unreadable"."""
        self.add("read", path, -bytes, files=-1)
        self.add("skipped: unreadable", path, bytes)

    def format_lines(self) -> list[str]:
        """Format the counts as the lines of a table; no lines if there are no files."""
        rows = [
            (outcome, suffix, f"{count.files:,}", f"{count.bytes:,}")
            for outcome, count_of_suffix in sorted(self.items())
            for suffix, count in sorted(count_of_suffix.items())
            if count.files
        ]
        if not rows:
            return []
        table = [("input", "suffix", "files", "bytes"), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        return [
            f"  {outcome:{widths[0]}}  {suffix:{widths[1]}}  {files:>{widths[2]}}  {num_bytes:>{widths[3]}}"
            for outcome, suffix, files, num_bytes in table
        ]


@dataclass
class PrepareReport:
    """Counts of the input rows by outcome: bad, empty, removed by a rule, or kept.

    The names of the fields are the keys of `report.json`.
    """

    options: dict[str, Any]  # options that change the content of the corpus
    rows: int = 0
    bad_rows: int = 0
    empty_documents: int = 0
    kept: TextCount = field(default_factory=TextCount)
    removed: RemovalCounts = field(default_factory=RemovalCounts)
    bad_bytes: int = 0  # size of the bad rows
    inputs: InputFileCounts = field(default_factory=InputFileCounts)
    # {path: (size in bytes, reason)} of the files that became unreadable in the middle of a read
    unreadable: dict[str, tuple[int, str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def add(self, other: "PrepareReport") -> None:
        """Add the counts of another part of the corpus."""
        self.rows += other.rows
        self.bad_rows += other.bad_rows
        self.bad_bytes += other.bad_bytes
        self.warnings += [warning for warning in other.warnings if warning not in self.warnings]
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
    def load(directory: Path) -> "PrepareReport":
        """Read the report that `save` wrote. Raises DataError if it is missing or malformed."""
        path = directory / REPORT_FILE
        try:
            fields = json.loads(path.read_bytes())
            if fields.pop("format") != FORMAT:
                raise ValueError(f"not of format '{FORMAT}'")
            removed = RemovalCounts({rule: TextCount(**counts) for rule, counts in fields.pop("removed").items()})
            inputs = InputFileCounts(
                {
                    outcome: {suffix: FileCount(**count) for suffix, count in count_of_suffix.items()}
                    for outcome, count_of_suffix in fields.pop("inputs", {}).items()
                }
            )
            unreadable = {path: (size, reason) for path, (size, reason) in fields.pop("unreadable", {}).items()}
            fields |= {"inputs": inputs, "unreadable": unreadable}
            return PrepareReport(kept=TextCount(**fields.pop("kept")), removed=removed, **fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}: cannot be read: {error!r}. Prepare the part again.") from None

    def format_lines(self) -> list[str]:
        """Format the table of the input, and one line per rule."""
        return self.inputs.format_lines() + [
            f"  {rule} removed {removed.documents:,} documents, {removed.lines:,} lines, {removed.bytes:,} bytes"
            for rule, removed in self.removed.items()
        ]
