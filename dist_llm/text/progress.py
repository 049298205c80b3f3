"""Show the progress of `prepare` and `adopt`: a bar on a terminal, otherwise a line every SECONDS_PER_LINE."""

import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

SECONDS_PER_LINE = 10.0  # pause between two lines if the output is not a terminal


class ProgressMeter:
    """Shows bytes read of `total_bytes` (None: unknown), the rate in MB/s and the number of documents."""

    def __init__(self, log_stream: TextIO, total_bytes: int | None, activity: str = "tokenizing") -> None:
        self.total_bytes, self.activity = total_bytes, activity
        self._console = Console(file=log_stream)
        self._start = self._last_print = time.monotonic()
        columns = (
            TextColumn(activity),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=total_bytes, state="")

    def __enter__(self) -> "ProgressMeter":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        """Seconds since the meter was created."""
        return time.monotonic() - self._start

    def update(self, bytes_read: int, text_bytes: int, documents: int) -> None:
        """Update the bar, or print a line if the last line is SECONDS_PER_LINE old."""
        state = f"{documents:,} documents, {text_bytes / 1e6 / max(self.seconds, 1e-9):.1f} MB/s"
        self._bar.update(self._task, completed=bytes_read, state=state)
        if self._bar.disable and time.monotonic() - self._last_print >= SECONDS_PER_LINE:
            self._last_print = time.monotonic()
            self.print_line(f"{self.activity}: {self._format_remaining(bytes_read)}{state}")

    def print_line(self, line: str) -> None:
        """Print one line, above the bar if one is shown."""
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _format_remaining(self, bytes_read: int) -> str:
        if not self.total_bytes or not bytes_read:
            return ""
        remaining_seconds = self.seconds * (self.total_bytes - bytes_read) / bytes_read
        return f"{bytes_read / self.total_bytes:.0%}, {remaining_seconds:.0f} s left, "
