"""How far `prepare` is: a bar on a terminal, else a plain line now and then."""

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

PLAIN_SECONDS = 10.0


class Meter:
    """Shows bytes read of `total_bytes` (None: unknown), the rate in MB/s and the documents; `doing` what."""

    def __init__(self, stream: TextIO, total_bytes: int | None, doing: str = "tokenizing") -> None:
        self.total_bytes, self.doing = total_bytes, doing
        self._console = Console(file=stream)
        self._began = self._said = time.monotonic()
        columns = (
            TextColumn(doing),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("", total=total_bytes, state="")

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def update(self, bytes_read: int, text_bytes: int, documents: int) -> None:
        """Say where it stands, if it is time."""
        state = f"{documents:,} documents, {text_bytes / 1e6 / max(self.seconds, 1e-9):.1f} MB/s"
        self._bar.update(self._task, completed=bytes_read, state=state)
        if self._bar.disable and time.monotonic() - self._said >= PLAIN_SECONDS:
            self._said = time.monotonic()
            self.say(f"{self.doing}: {self._share(bytes_read)}{state}")

    def say(self, line: str) -> None:
        """Print one line, above the bar if there is one."""
        self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def _share(self, bytes_read: int) -> str:
        if not self.total_bytes or not bytes_read:
            return ""
        left = self.seconds * (self.total_bytes - bytes_read) / bytes_read
        return f"{bytes_read / self.total_bytes:.0%}, {left:.0f} s left, "
