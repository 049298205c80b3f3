"""Fetch a URL into a file of the local cache, completely or not at all.

A download is written to a temporary file, checked for size and hash, synced and then renamed. So a file with its final
name is complete, however many processes and machines share the cache and wherever they are killed. The lock only
prevents the processes of one machine from fetching the same file twice. Correctness does not depend on it: the kernel
releases it when its holder dies, and a file system without locks is as safe.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from http.client import HTTPResponse
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen
from uuid import uuid4

from blake3 import blake3

from dist_llm.errors import DataError

log = logging.getLogger("dist_llm")
Result = TypeVar("Result")

BLOCK_BYTES = 1 << 22
MAX_TRIES, PAUSE_SECONDS, TIMEOUT_SECONDS = 4, 1.0, 60.0  # the pause doubles after each try
ABANDONED_SECONDS = 3600.0  # a partial file that was not written to for so long has no writer
RETRYABLE_STATUSES = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}


class RemoteError(Exception):
    """A read of a remote file failed. `permanent`: a retry would fail too."""

    def __init__(self, message: str, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


def is_remote(location: str) -> bool:
    """Return whether `location` is a URL that is not a file:// URL."""
    return re.match("[A-Za-z][A-Za-z0-9+.-]+://", location) is not None and not location.startswith("file://")


def as_path(location: str) -> Path:
    """Return a local path, given as a path or as a file:// URL."""
    return Path(unquote(urlsplit(location).path)) if location.startswith("file://") else Path(location)


def iter_blocks(url: str) -> Iterator[bytes]:
    """Yield the bytes of `url` in blocks. Raises RemoteError if they cannot be read or the connection ends early."""
    try:
        with _open_url(url) as file:
            while block := file.read(BLOCK_BYTES):
                yield block
            if isinstance(file, HTTPResponse) and file.length:  # bytes that are missing
                raise OSError(f"the connection ended {file.length} bytes early")
    except HTTPError as error:
        error.close()
        permanent = error.code < HTTPStatus.INTERNAL_SERVER_ERROR and error.code not in RETRYABLE_STATUSES
        raise RemoteError(f"HTTP status {error.code} {error.reason}", permanent) from None
    except Exception as error:  # each fsspec backend raises its own exceptions
        permanent = isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError)
        raise RemoteError(f"{type(error).__name__}: {error}", permanent) from None


def _open_url(url: str) -> IO[bytes]:
    # fsspec's http backend needs aiohttp and starts a thread; the standard library needs neither.
    if url.startswith(("http://", "https://")):
        return urlopen(url, timeout=TIMEOUT_SECONDS)
    import fsspec

    return fsspec.open(url, "rb").open()


def with_retries(url: str, action: Callable[[], Result], hint: Callable[[], str]) -> Result:
    """Return the result of `action`, which reads `url`. Retries a few times after an error that is not permanent.

    Raises DataError with the URL and the hint.
    """
    for attempt in range(MAX_TRIES):
        try:
            return action()
        except RemoteError as error:
            if error.permanent or attempt == MAX_TRIES - 1:
                tries = "" if error.permanent else f" in {MAX_TRIES} tries"
                raise DataError(f"{url}: cannot be fetched{tries}: {error}. {hint()}") from None
            log.warning("%s: %s; trying again", url, error)
        time.sleep(PAUSE_SECONDS * 2**attempt)
    raise AssertionError("the last try returns or raises")


def create_hash(like: str = "blake3:") -> Any:
    """Return a new hash object of the algorithm that the digest `like` names. BLAKE3 takes a fifth of SHA-256's
    time."""
    return blake3() if like.startswith("blake3:") else hashlib.new(like.partition(":")[0])


def format_digest(digest: Any) -> str:
    """Return the digest as manifests store it: `blake3:` or `sha256:`, then hexadecimal digits."""
    return f"{digest.name}:{digest.hexdigest()}"


def fetch(url: str, target: Path, size: int | None, expected_hash: str | None) -> Path:
    """Return `target`. If it does not exist, fetch it from `url`, and check its size and hash if they are given.

    Raises DataError if the download fails or differs, or if it cannot be written.
    """
    if target.exists():
        return target
    hint = f"Check the URL, the network and your credentials, or copy the file by other means to {target}"
    with convert_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock_exclusively(target):
            if not target.exists():
                log.info("fetching %s (%s bytes)", url, f"{size:,}" if size else "unknown")
                with_retries(url, lambda: _download(url, target, size, expected_hash), lambda: hint)
    return target


@contextmanager
def convert_write_errors(target: Path) -> Iterator[None]:
    """Convert an OSError of the block into a DataError about the cache."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or target}: cannot be written: {error.strerror or error}. "
            "Free disk space, or set data.cache to a directory with enough space."
        ) from None


def _download(url: str, target: Path, size: int | None, expected_hash: str | None) -> None:
    partial = target.with_name(f"{target.name}.{uuid4().hex}.partial")
    digest, length = create_hash(expected_hash or "blake3:"), 0
    try:
        with partial.open("xb") as file:
            for block in iter_blocks(url):
                file.write(block)
                digest.update(block)
                length += len(block)
            file.flush()
            os.fsync(file.fileno())
        if size not in (None, length):
            raise RemoteError(f"received {length} bytes, but the manifest promises {size}")
        if expected_hash not in (None, format_digest(digest)):
            raise RemoteError(f"received data with {format_digest(digest)}, but the manifest promises {expected_hash}")
        partial.rename(target)
        sync_directory(target.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _lock_exclusively(target: Path) -> Iterator[None]:
    """Hold the lock of `target`, and remove what killed downloads of it left behind."""
    lock = target.with_name(target.name + ".lock")
    while True:
        with lock.open("w") as file:
            with suppress(OSError):  # this file system has no locks: processes may fetch twice, which is safe
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_same_file(lock, file):  # the previous holder removed it between our open and our lock
                continue
            try:
                _remove_abandoned(target.parent.glob(target.name + ".*.partial"))
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_same_file(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_abandoned(partials: Iterator[Path]) -> None:
    for partial in partials:
        with suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def sync_directory(directory: Path) -> None:
    """Make the directory's entries durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
