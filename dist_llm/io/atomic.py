"""Write files and folders so that a crash leaves the old content or the new content, and never a mixture of both.

New content gets a temporary name, is synced to the disk, and is renamed to its own name; then the folder is synced, so
that the rename survives a power cut. Inside a folder that has its own name only when it is complete, `write_durably`
is enough.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO, cast
from uuid import uuid4

SUFFIX = ".partial"  # of temporary names


class TargetExistsError(FileExistsError):
    """Another process has created the target in the meantime."""


@contextmanager
def open_durably(path: Path, mode: str = "wb") -> Iterator[BinaryIO]:
    """Open a file, and sync it when the block ends. A crash within the block may leave an incomplete file."""
    with path.open(mode) as file:
        yield cast(BinaryIO, file)
        sync_file(file)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and sync it. A crash may leave an incomplete file."""
    with open_durably(path) as file:
        file.write(content)


@contextmanager
def open_replacement(path: Path, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` when the block ends. An error in the block leaves `path` as it is.

    `shared`: other processes may replace the file at the same time; the last one wins.
    """
    temporary = temporary_path(path, shared)
    try:
        with open_durably(temporary) as file:
            yield file
        temporary.replace(path)
    finally:
        _discard(temporary)
    sync_directory(path.parent)


def replace_file(path: Path, content: bytes, shared: bool = False) -> None:
    """Write `content` to `path` atomically. `shared`: as for `open_replacement`."""
    with open_replacement(path, shared) as file:
        file.write(content)


@contextmanager
def create_atomically(target: Path, shared: bool = False) -> Iterator[Path]:
    """Yield a path for a new file or folder. When the block ends, sync it with all its content and rename it to
    `target`. An error removes it.

    The caller creates the file or folder, and its parents. An existing file or empty folder is replaced. Raises
    TargetExistsError if the target is a folder with content. `shared`: other processes may create the target at the
    same time; the first one wins.
    """
    temporary = temporary_path(target, shared)
    remove(temporary)  # left behind by a killed process
    try:
        yield temporary
        sync_tree(temporary)
        try:
            temporary.replace(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise TargetExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        sync_directory(target.parent)
    finally:
        _discard(temporary)


def temporary_path(path: Path, shared: bool = False) -> Path:
    """Return the temporary name of a file or folder: the same one for each write or, if `shared`, a unique one.

    The next write overwrites what a killed process left under the same name. Unique names of killed processes remain.
    """
    return path.with_name(f"{path.name}.{uuid4().hex}{SUFFIX}" if shared else f"{path.name}{SUFFIX}")


def remove(path: Path) -> None:
    """Remove a file or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(temporary: Path) -> None:
    with suppress(OSError):  # an error of the block says more
        remove(temporary)


def sync_file(file: IO[bytes]) -> None:
    """Make the content of an open file durable. Raises what `fileno` raises if it is not a file of the system."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    _sync_path(directory)


def sync_tree(path: Path) -> None:
    """Make a file durable, or a folder with all that it contains."""
    for entry in path.rglob("*") if path.is_dir() else ():
        if not entry.is_symlink():
            _sync_path(entry)
    _sync_path(path)


def _sync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
