"""A file that only grows and is hashed as it grows, so that an interrupted writer can take it up again."""

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dist_llm.errors import DataError

READ_BYTES = 1 << 20


@dataclass(frozen=True)
class FileState:
    """How far a file had come: its first `size_bytes` have this hash."""

    size_bytes: int
    sha256: str


class GrowingFile:
    """Appends bytes; `sync` makes them durable and says how far the file has come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        self._hash, self._size = hashlib.sha256(), 0

    @classmethod
    def reopen(cls, path: Path, state: FileState) -> "GrowingFile":
        """Go on at `state`, dropping what follows. Raises DataError where the file is no longer as it was."""
        file = cls.__new__(cls)
        file.path, file._hash, file._size = path, check_prefix(path, state), state.size_bytes
        file._file = path.open("r+b")
        file._file.truncate(state.size_bytes)
        file._file.seek(state.size_bytes)
        return file

    @property
    def closed(self) -> bool:
        return self._file.closed

    def write(self, raw: bytes) -> None:
        self._file.write(raw)
        self._hash.update(raw)
        self._size += len(raw)

    @property
    def state(self) -> FileState:
        return FileState(self._size, self._hash.hexdigest())

    def sync(self) -> FileState:
        self._file.flush()
        os.fsync(self._file.fileno())
        return self.state

    def close(self) -> FileState:
        """Sync and close."""
        state = self.sync()
        self._file.close()
        return state

    def abandon(self) -> None:
        """Let go of the file after an error; what is in it does not matter."""
        with suppress(OSError):  # a full disk: the error that brought us here says so
            self._file.close()


def check_prefix(path: Path, state: FileState) -> "hashlib._Hash":
    """The hash of the first bytes of a file. Raises DataError unless they are those of `state`."""
    digest, left = hashlib.sha256(), state.size_bytes
    try:
        with path.open("rb") as file:
            while left and (block := file.read(min(left, READ_BYTES))):
                digest.update(block)
                left -= len(block)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    if left or digest.hexdigest() != state.sha256:
        raise DataError(f"{path}: its first {state.size_bytes} bytes are not those that were written.")
    return digest
