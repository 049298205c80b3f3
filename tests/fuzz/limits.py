"""Limit the memory and the time of a reader of files.

with limit_memory_and_time():
    read(folder)  # raises MemoryError or HangError above the limits
"""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_READER_BYTES = 1 << 29  # address space that a reader may use; the files have some kilobytes
TIMEOUT_SECONDS = 60  # after this time a reader counts as hanging


class HangError(BaseException):
    """A reader takes too long. The class is not an `Exception`, because readers may catch those."""


@contextmanager
def limit_memory_and_time() -> Iterator[None]:
    """Limit the address space and the time of the block."""

    def raise_hang_error(*_: object) -> None:
        raise HangError

    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    old_limits = resource.getrlimit(resource.RLIMIT_AS)
    old_handler = signal.signal(signal.SIGALRM, raise_hang_error)
    signal.alarm(TIMEOUT_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (num_pages * resource.getpagesize() + MAX_READER_BYTES, old_limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old_limits)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old_handler)
