"""Locks between processes: kernel locks on one machine, and exclusive file creation on a shared file system."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def lock_file(path: Path, wait: bool = True, required: bool = True) -> Iterator[None]:
    """Lock the file `path` exclusively for the `with` block, then remove it. If the process dies, the kernel unlocks.

    If another process has the lock, wait for it or, with `wait` false, raise BlockingIOError. On a file system without
    locks, raise OSError or, with `required` false, run the `with` block without a lock.
    """
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise
            except OSError:
                if required:
                    raise
            if not _is_same_file(path, file):  # the previous holder removed the file after we opened it
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_same_file(path: Path, file: IO[str]) -> bool:
    """Return whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def create_exclusively(path: Path, content: bytes) -> bool:
    """Create a file unless it exists. Return whether it was created. This also works on shared file systems.

    If the content cannot be written, remove the file and raise an OSError that names `path`.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    except OSError as error:
        path.unlink()  # for example, the disk is full
        raise OSError(error.errno, error.strerror, str(path)) from None
    return True
