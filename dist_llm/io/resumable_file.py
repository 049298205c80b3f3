"""A file that is appended to and hashed at the same time, so that an interrupted writer can resume it."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dist_llm.errors import DataError
from dist_llm.io.atomic import sync_file

READ_BYTES = 1 << 20  # bytes per read while hashing


@dataclass(frozen=True)
class FileState:
    """A state from which `ResumableFile.reopen` resumes: the first `size_bytes` bytes of the file have this hash."""

    size_bytes: int
    sha256: str


class ResumableFile:
    """Appends bytes to a file. `sync` writes them to the disk and returns the state to resume from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._hash, self._size = hashlib.sha256(), 0

    @classmethod
    def reopen(cls, path: Path, state: FileState) -> "ResumableFile":
        """Resume from `state` and drop the bytes after it. Raises DataError if the file has changed."""
        file = cls.__new__(cls)
        file.path, file._hash, file._size = path, hash_prefix(path, state), state.size_bytes
        file._file = path.open("r+b")
        file._file.truncate(state.size_bytes)
        file._file.seek(state.size_bytes)
        return file

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, content: bytes) -> None:
        """Append bytes and hash them. They are durable after `sync`."""
        self._file.write(content)
        self._hash.update(content)
        self._size += len(content)

    @property
    def state(self) -> FileState:
        """Size and hash of all appended bytes, which are not all on the disk yet."""
        return FileState(self._size, self._hash.hexdigest())

    def sync(self) -> FileState:
        """Write all appended bytes to the disk, and return the state to resume from."""
        sync_file(self._file)
        return self.state

    def close(self) -> FileState:
        """Sync and close the file."""
        state = self.sync()
        self._file.close()
        return state

    def abandon(self) -> None:
        """Close the file after an error, without a sync."""
        with suppress(OSError):  # for example a full disk, which the original error has already reported
            self._file.close()


def hash_prefix(path: Path, state: FileState) -> "hashlib._Hash":
    """Return the hash object of the first `state.size_bytes` bytes. Raises DataError unless it is that of `state`."""
    digest, remaining_bytes = hashlib.sha256(), state.size_bytes
    try:
        with path.open("rb") as file:
            while remaining_bytes and (block := file.read(min(remaining_bytes, READ_BYTES))):
                digest.update(block)
                remaining_bytes -= len(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    if remaining_bytes or digest.hexdigest() != state.sha256:
        raise DataError(f"{path}: its first {state.size_bytes} bytes have changed since they were written.")
    return digest
