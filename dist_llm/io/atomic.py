"""Write files and folders atomically: after a crash there is the old content or the new content, never a mixture.

New content is written under a temporary name, synced to the disk, and renamed to its final name. Then the parent folder
is synced, so that the rename survives a power cut. Inside a folder that is renamed when it is complete, `write_durably`
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

PARTIAL_SUFFIX = ".partial"  # suffix of temporary names


class TargetExistsError(FileExistsError):
    """The target already exists, because another process created it in the meantime."""


@contextmanager
def open_durably(path: Path, mode: str = "wb") -> Iterator[BinaryIO]:
    """Open a file, and sync it when the `with` block ends. A crash within the block may leave an incomplete file."""
    with path.open(mode) as file:
        yield cast(BinaryIO, file)
        sync_file(file)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and sync it. A crash may leave an incomplete file."""
    with open_durably(path) as file:
        file.write(content)


@contextmanager
def open_replacement(path: Path, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path` when the `with` block ends. An error in the block leaves `path` as it is.

    `shared`: other processes may replace the file at the same time; the last process wins.
    """
    temporary = get_temporary_path(path, shared)
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
    """Yield a temporary path, at which the caller creates a file or folder. Rename it to `target` at the end.

    The content is synced before the rename. If the `with` block raises, the file or folder is removed. An existing
    target is replaced if it is a file or an empty folder. Raises TargetExistsError if it is a folder with content.
    `shared`: other processes may create the target at the same time; the first process wins.
    """
    temporary = get_temporary_path(target, shared)
    remove(temporary)  # a killed process may have left it
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


def get_temporary_path(path: Path, shared: bool = False) -> Path:
    """Return the temporary path of a file or folder. If `shared`, the path is unique.

    A killed process may leave a file under this path. The next write overwrites it, unless the path is unique.
    """
    return path.with_name(f"{path.name}.{uuid4().hex}{PARTIAL_SUFFIX}" if shared else f"{path.name}{PARTIAL_SUFFIX}")


def remove(path: Path) -> None:
    """Remove a file or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _discard(temporary: Path) -> None:
    with suppress(OSError):  # an error of the `with` block is more informative
        remove(temporary)


def sync_file(file: IO[bytes]) -> None:
    """Sync the content of an open file to the disk. If the object is no system file, `fileno` raises."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Sync the names in a directory to the disk."""
    _sync_path(directory)


def sync_tree(path: Path) -> None:
    """Sync a file, or a folder with everything in it, to the disk."""
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
