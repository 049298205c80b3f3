"""A directory that holds a checkpoint, on a disk or at a URL that fsspec opens, and torch's reader and writer of it.

What is written here is hashed on its way, so that a manifest of it costs no second reading.
"""

import errno
import io
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from dist_llm.checkpoint.metadata import load_metadata
from dist_llm.data.remote import create_hash, format_digest, sync_directory
from dist_llm.errors import CheckpointError

READ_BYTES = 1 << 22  # at once: of a remote file by one request
WRITE_BYTES = 1 << 20  # at once: few enough to be in the cache still when they are hashed
AHEAD_BYTES = 1 << 23  # after which the disk is told to begin
METADATA = ".metadata"  # torch's, of all tensors
CANCELLED = "another thread could not write"
WRITERS = 2  # threads, each with a file of its own: one writes and hashes while the other waits for the disk


class Folder:
    """The directory at `place`, a path or a URL. Its small files are read and written whole."""

    def __init__(self, place: "Folder | Path | str") -> None:
        self.place = str(place).rstrip("/")
        self.fs, self.path = fsspec.core.url_to_fs(self.place)

    def __str__(self) -> str:
        return self.place

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and other.place == self.place

    def __hash__(self) -> int:
        return hash(self.place)

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.place}/{name}")

    @property
    def name(self) -> str:
        return self.place.rpartition("/")[2]

    @property
    def local(self) -> Path | None:
        """Its path, if it is on a disk."""
        return Path(self.path) if isinstance(self.fs, LocalFileSystem) else None

    def names(self) -> list[str]:
        """What it holds, sorted; nothing if it is not there."""
        self.fs.invalidate_cache()
        try:
            return sorted(str(path).rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int:
        return int(self.fs.size(f"{self.path}/{name}"))

    def read(self, name: str) -> bytes:
        content: bytes = self.fs.cat_file(f"{self.path}/{name}")
        return content

    def hash(self, name: str, like: str) -> str:
        """Of a whole file, read in blocks, of the kind that `like` is."""
        digest = create_hash(like)
        with self.fs.open(f"{self.path}/{name}", "rb", block_size=READ_BYTES) as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
        return format_digest(digest)

    def write(self, name: str, content: bytes) -> None:
        """Durably, where that is ours to say."""
        with self.fs.open(f"{self.path}/{name}", "wb") as file:
            file.write(content)
            file.flush()
            _sync(file)

    def make(self) -> None:
        self.fs.makedirs(self.path, exist_ok=True)

    def sync(self) -> None:
        """Make the names in it durable."""
        if self.local is not None:
            sync_directory(self.local)

    def remove(self, name: str = "") -> None:
        """One file, or the folder with all that is in it; nothing if it is not there."""
        with suppress(FileNotFoundError):
            if name:
                self.fs.rm_file(f"{self.path}/{name}")
            else:
                self.fs.rm(self.path, recursive=True)


@dataclass(frozen=True)
class Written:
    """A file's size, and its hash as `named` has it."""

    bytes: int
    hash: str


class FolderReader(filesystem.FileSystemReader):
    """torch's reader, of a folder anywhere."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(folder.path)
        self.path = folder.path
        self.fs = _Files(folder.fs)  # type: ignore[assignment]  # declared as one for disks alone
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """As torch's, which would run what the file names. Raises CheckpointError."""
        metadata = load_metadata(self.folder.read(METADATA), f"{self.folder}/{METADATA}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class FolderWriter(filesystem.FileSystemWriter):
    """torch's writer, into a folder anywhere; `written` is what this rank wrote, by name."""

    def __init__(self, folder: Folder, few_files: bool = True) -> None:
        # Nothing is copied ahead: that would be on the stream of another device than this rank's, in a thread.
        durable, threads = folder.local is not None, WRITERS if few_files else 1
        super().__init__(folder.path, few_files, durable, thread_count=threads, per_thread_copy_ahead=0)
        self.path = folder.path
        self.files = _Files(folder.fs)
        self.fs = self.files  # type: ignore[assignment]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Raises what went wrong in any thread, which torch would leave there; then none writes any more."""
        before = torch.serialization.get_crc32_options()
        try:
            done = super().write_data(plan, planner)
            if len(done.value()) < len(plan.items):
                raise self.problem or CheckpointError("a thread that writes tensors failed; its error is above")
        except BaseException:
            self.files.stop()
            raise
        finally:
            torch.serialization.set_crc32_options(before)
        return done

    @property
    def problem(self) -> OSError | None:
        """What the system said where a write failed."""
        return self.files.problem

    @property
    def written(self) -> dict[str, Written]:
        return {path.rpartition("/")[2]: written for path, written in self.files.written.items()}


class _Files(filesystem.FileSystemBase):
    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        self.fs = fs
        self.on_disk = isinstance(fs, LocalFileSystem) and hasattr(os, "posix_fadvise")
        self.written: dict[str, Written] = {}
        self.problem: OSError | None = None
        self.streams: set[_Hashed] = set()  # that are open
        self.stopped = False

    def stop(self) -> None:
        """Let every thread fail at its next write, and wait for that."""
        self.stopped = True
        while self.streams:
            time.sleep(0.01)

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        if self.stopped:
            raise OSError(errno.ECANCELED, CANCELLED)
        with self.fs.open(path, mode) as file:
            if mode != "wb":
                yield file
                return
            # torch.save's own checksum takes longer than the write, and every byte is hashed here. The option is this
            # thread's own; in older torch it is the process's, and `write_data` puts it back.
            torch.serialization.set_crc32_options(False)
            stream = _Hashed(file, self)
            self.streams.add(stream)
            try:
                yield stream
            finally:
                self.problem = self.problem or stream.problem
                self.streams.discard(stream)
            self.written[str(path)] = Written(stream.length, format_digest(stream.digest))

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{path}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self.fs.mv(path, new_path)
        self.written[str(new_path)] = self.written.pop(str(path))

    def mkdir(self, path: str | os.PathLike[str]) -> None:
        self.fs.makedirs(path, exist_ok=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def exists(self, path: str | os.PathLike[str]) -> bool:
        return bool(self.fs.exists(path))

    def rm_file(self, path: str | os.PathLike[str]) -> None:
        self.fs.rm_file(path)

    def ls(self, path: str | os.PathLike[str]) -> list[str]:
        names: list[str] = self.fs.ls(path, detail=False)
        return names


class _Hashed(io.RawIOBase):
    """Hands on what is written, and hashes it."""

    def __init__(self, file: IO[bytes], files: _Files) -> None:
        self.file, self.files, self.length, self.digest = file, files, 0, create_hash()
        self.announced = 0  # bytes that the system was told to write
        self.problem: OSError | None = None

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        for start in range(0, len(view), WRITE_BYTES):
            self._write(view[start : start + WRITE_BYTES])
        return len(view)

    def _write(self, block: memoryview) -> None:
        if self.files.stopped:
            raise OSError(errno.ECANCELED, CANCELLED)
        try:
            self.file.write(block)
        except OSError as error:
            self.problem = error
            raise
        self.digest.update(block)
        self.length += len(block)
        if self.files.on_disk and self.length - self.announced >= AHEAD_BYTES:
            file = self.fileno()
            with suppress(OSError):  # the advice: have the disk begin now, not when the file is synced
                os.posix_fadvise(file, self.announced, self.length - self.announced, os.POSIX_FADV_DONTNEED)
            self.announced = self.length

    def tell(self) -> int:
        return self.length

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.problem = error
            raise

    def fileno(self) -> int:
        self.flush()  # torch asks in order to fsync, and not always flushes before
        return self.file.fileno()  # a remote file has none and says so, which torch knows

    def close(self) -> None:
        pass  # torch closes a stream after each tensor; the file goes on


def _sync(file: Any) -> None:
    with suppress(AttributeError, io.UnsupportedOperation):
        os.fsync(file.fileno())
