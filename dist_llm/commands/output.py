"""Standard output of commands that only print."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ignore_broken_pipe() -> Iterator[None]:
    """End quietly if the reader of a pipe closes it early (`| head`)."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # Redirect the rest of the buffer to /dev/null, or Python complains at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
