"""A directory for checkpoints, on a disk or at a URL, and the DCP reader and writer for it.

All access goes through fsspec. Files are hashed while they are written, so the manifest needs no second read. DCP is
torch.distributed.checkpoint.
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
from dist_llm.errors import CheckpointError
from dist_llm.io.atomic import sync_directory, sync_file
from dist_llm.io.hashing import create_hash, format_digest

READ_BYTES = 1 << 22  # bytes per read request of a remote file
WRITE_BYTES = 1 << 20  # bytes per write; they are still in the CPU cache when they are hashed
WRITEBACK_BYTES = 1 << 23  # after this many bytes, the system is advised to start writing to the disk
METADATA_FILE = ".metadata"  # name that DCP gives to the file with shapes and positions of tensors
CANCELLED = "another thread could not write"  # error of a thread that `_HashingFileSystem.stop` ends
NUM_WRITE_THREADS = 2  # each thread has its own file; one hashes while the other waits for the disk


class CheckpointFolder:
    """A directory of a checkpoint, or of several checkpoints, given by a path or a URL."""

    def __init__(self, location: "CheckpointFolder | Path | str") -> None:
        self.location = str(location).rstrip("/")
        self.fs, self.path = fsspec.core.url_to_fs(self.location)

    def __str__(self) -> str:
        return self.location

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckpointFolder) and other.location == self.location

    def __hash__(self) -> int:
        return hash(self.location)

    def __truediv__(self, name: str) -> "CheckpointFolder":
        return CheckpointFolder(f"{self.location}/{name}")

    @property
    def name(self) -> str:
        return self.location.rpartition("/")[2]

    @property
    def local_path(self) -> Path | None:
        """The path, if the directory is on a local disk; else None."""
        return Path(self.path) if isinstance(self.fs, LocalFileSystem) else None

    def list_names(self) -> list[str]:
        """Return the names of all entries, sorted; an empty list if the directory does not exist."""
        self.fs.invalidate_cache()
        try:
            return sorted(str(path).rstrip("/").rpartition("/")[2] for path in self.fs.ls(self.path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return int(self.fs.size(f"{self.path}/{name}"))

    def read(self, name: str) -> bytes:
        """Read a file."""
        content: bytes = self.fs.cat_file(f"{self.path}/{name}")
        return content

    def compute_hash(self, name: str, reference_hash: str) -> str:
        """Read a file in blocks and return its hash, by the algorithm of `reference_hash`."""
        digest = create_hash(reference_hash)
        with self.fs.open(f"{self.path}/{name}", "rb", block_size=READ_BYTES) as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
        return format_digest(digest)

    def write(self, name: str, content: bytes) -> None:
        """Write a file. On a local disk it is durable on return."""
        with self.fs.open(f"{self.path}/{name}", "wb") as file:
            file.write(content)
            with suppress(AttributeError, io.UnsupportedOperation):  # remote files raise these
                sync_file(file)

    def create(self) -> None:
        """Create the directory if it does not exist."""
        self.fs.makedirs(self.path, exist_ok=True)

    def sync(self) -> None:
        """Make the file names in the directory durable, if it is on a local disk."""
        if self.local_path is not None:
            sync_directory(self.local_path)

    def remove(self, name: str = "") -> None:
        """Remove one file, or without `name` the directory and its content. Do nothing if it does not exist."""
        with suppress(FileNotFoundError):
            if name:
                self.fs.rm_file(f"{self.path}/{name}")
            else:
                self.fs.rm(self.path, recursive=True)


@dataclass(frozen=True)
class FileRecord:
    """The size of a file, and its hash in the format of `format_digest`."""

    bytes: int
    hash: str


class FolderReader(filesystem.FileSystemReader):
    """The DCP reader of a `CheckpointFolder`."""

    def __init__(self, folder: CheckpointFolder) -> None:
        super().__init__(folder.path)
        self.path = folder.path
        self.fs = _HashingFileSystem(folder.fs)  # type: ignore[assignment]  # torch declares a class for local disks
        self.folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the metadata without unpickling arbitrary classes. Raises CheckpointError if it is damaged."""
        metadata = load_metadata(self.folder.read(METADATA_FILE), f"{self.folder}/{METADATA_FILE}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class FolderWriter(filesystem.FileSystemWriter):
    """The DCP writer of a `CheckpointFolder`. `file_records` has the files that this rank has written, by name."""

    def __init__(self, folder: CheckpointFolder, few_files: bool = True) -> None:
        # No copy-ahead, because it would run in a thread, on the stream of another device.
        super().__init__(
            folder.path,
            single_file_per_rank=few_files,
            sync_files=folder.local_path is not None,
            thread_count=NUM_WRITE_THREADS if few_files else 1,
            per_thread_copy_ahead=0,
        )
        self.path = folder.path
        self.files = _HashingFileSystem(folder.fs)
        self.fs = self.files  # type: ignore[assignment]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the tensors. If a thread fails, stop the other threads and raise its error, which torch would lose."""
        crc32_options = torch.serialization.get_crc32_options()
        try:
            results = super().write_data(plan, planner)
            if len(results.value()) < len(plan.items):
                raise self.error or CheckpointError("a thread that writes tensors failed; its error is above")
        except BaseException:
            self.files.stop()
            raise
        finally:
            torch.serialization.set_crc32_options(crc32_options)
        return results

    @property
    def error(self) -> OSError | None:
        """The error of the operating system, if a write failed."""
        return self.files.error

    @property
    def file_records(self) -> dict[str, FileRecord]:
        """{file name: record} of the files that this rank has written."""
        return {path.rpartition("/")[2]: record for path, record in self.files.file_records.items()}


class _HashingFileSystem(filesystem.FileSystemBase):
    """A file system for DCP on top of fsspec, which hashes the files that it writes."""

    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        self.fs = fs
        self.on_disk = isinstance(fs, LocalFileSystem) and hasattr(os, "posix_fadvise")
        self.file_records: dict[str, FileRecord] = {}
        self.error: OSError | None = None
        self.streams: set[_HashingStream] = set()  # open streams
        self.stopped = False

    def stop(self) -> None:
        """Make each thread fail at its next write, and wait until all streams are closed."""
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
            # The CRC32 of torch.save takes longer than the write and is not needed. The option is thread-local; in
            # older versions of torch it is global, so `write_data` restores it.
            torch.serialization.set_crc32_options(False)
            stream = _HashingStream(file, self)
            self.streams.add(stream)
            try:
                yield stream
            finally:
                self.error = self.error or stream.error
                self.streams.discard(stream)
            self.file_records[str(path)] = FileRecord(stream.num_bytes, format_digest(stream.digest))

    def concat_path(self, path: str | os.PathLike[str], suffix: str) -> str:
        return f"{path}/{suffix}"

    def init_path(self, path: str | os.PathLike[str]) -> str:
        return str(path)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        self.fs.mv(path, new_path)
        self.file_records[str(new_path)] = self.file_records.pop(str(path))

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


class _HashingStream(io.RawIOBase):
    """Forwards writes to a file and hashes them."""

    def __init__(self, file: IO[bytes], files: _HashingFileSystem) -> None:
        self.file, self.files, self.num_bytes, self.digest = file, files, 0, create_hash()
        self.writeback_bytes = 0  # the system has been advised to write this many bytes to the disk
        self.error: OSError | None = None

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
            self.error = error
            raise
        self.digest.update(block)
        self.num_bytes += len(block)
        if self.files.on_disk and self.num_bytes - self.writeback_bytes >= WRITEBACK_BYTES:
            descriptor, num_new_bytes = self.fileno(), self.num_bytes - self.writeback_bytes
            with suppress(OSError):  # lets the system start writing to the disk before fsync
                os.posix_fadvise(descriptor, self.writeback_bytes, num_new_bytes, os.POSIX_FADV_DONTNEED)
            self.writeback_bytes = self.num_bytes

    def tell(self) -> int:
        return self.num_bytes

    def flush(self) -> None:
        try:
            self.file.flush()
        except OSError as error:
            self.error = error
            raise

    def fileno(self) -> int:
        self.flush()  # torch calls this before fsync, and does not always flush before
        return self.file.fileno()  # remote files raise an error, which torch handles

    def close(self) -> None:
        pass  # torch closes a stream after each tensor; the file stays open
