"""Files that are far away: a URL becomes a file of the local cache, whole or not at all.

What is fetched goes to a name of its own, is measured, hashed and made durable, and only then renamed. So what
has a final name is whole, however many processes and machines share the cache and however they end. The lock
spares the processes of a machine from fetching the same file twice; nothing rests on it, the kernel releases
it when its holder dies, and a file system that has no locks is as safe.
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
MAX_TRIES, PAUSE_SECONDS, TIMEOUT_SECONDS = 4, 1.0, 60.0  # the pause doubles from try to try
ABANDONED_SECONDS = 3600.0  # a partial file that nobody wrote to for so long has lost its writer
RETRYABLE_STATUSES = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}


class RemoteError(Exception):
    """What went wrong at the far end; `hopeless` where another try would end alike."""

    def __init__(self, message: str, permanent: bool = False) -> None:
        super().__init__(message)
        self.permanent = permanent


def is_remote(location: str) -> bool:
    """Whether `place` is a URL of something else than a local file."""
    return re.match("[A-Za-z][A-Za-z0-9+.-]+://", location) is not None and not location.startswith("file://")


def as_path(location: str) -> Path:
    """A local path, given as such or as a file:// URL."""
    return Path(unquote(urlsplit(location).path)) if location.startswith("file://") else Path(location)


def iter_blocks(url: str) -> Iterator[bytes]:
    """The bytes of `url`, some at a time. Raises RemoteError where they cannot be had or end too early."""
    try:
        with _open_url(url) as file:
            while block := file.read(BLOCK_BYTES):
                yield block
            if isinstance(file, HTTPResponse) and file.length:  # what is still to come
                raise OSError(f"the connection ended {file.length} bytes early")
    except HTTPError as error:
        error.close()
        permanent = error.code < HTTPStatus.INTERNAL_SERVER_ERROR and error.code not in RETRYABLE_STATUSES
        raise RemoteError(f"HTTP status {error.code} {error.reason}", permanent) from None
    except Exception as error:  # each file system has errors of its own
        permanent = isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError)
        raise RemoteError(f"{type(error).__name__}: {error}", permanent) from None


def _open_url(url: str) -> IO[bytes]:
    # fsspec's http needs aiohttp and a thread of its own; the standard library does with neither.
    if url.startswith(("http://", "https://")):
        return urlopen(url, timeout=TIMEOUT_SECONDS)
    import fsspec

    return fsspec.open(url, "rb").open()


def with_retries(url: str, action: Callable[[], Result], hint: Callable[[], str]) -> Result:
    """The result of `action`, which reads `url`; tried again where that may help, a few times.

    Raises DataError that names the URL and the way out.
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
    """A hash to feed, of the kind that a `named` one is. BLAKE3 takes a fifth of SHA-256's time."""
    return blake3() if like.startswith("blake3:") else hashlib.new(like.partition(":")[0])


def format_digest(digest: Any) -> str:
    """What it was fed, as manifests have it: `blake3:` or `sha256:`, and hexadecimal digits."""
    return f"{digest.name}:{digest.hexdigest()}"


def fetch(url: str, target: Path, size: int | None, expected_hash: str | None) -> Path:
    """`target`, made from `url` if it is not there yet, of `size` bytes and the hash `wanted` where these are given.

    Raises DataError where the far end does not give that, or the near end has no room for it.
    """
    if target.exists():
        return target
    hint = f"Check the URL, the network and your credentials, or bring the file here by other means: {target}"
    with convert_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock_exclusively(target):
            if not target.exists():
                log.info("fetching %s (%s bytes)", url, f"{size:,}" if size else "unknown")
                with_retries(url, lambda: _download(url, target, size, expected_hash), lambda: hint)
    return target


@contextmanager
def convert_write_errors(target: Path) -> Iterator[None]:
    """Within the block, an OSError is one of the cache's, and a DataError to the user."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or target}: cannot be written: {error.strerror or error}. "
            "Make room, or set data.cache to a directory that has it."
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
            raise RemoteError(f"{length} bytes came, but the manifest promises {size}")
        if expected_hash not in (None, format_digest(digest)):
            raise RemoteError(f"what came has {format_digest(digest)}, but the manifest promises {expected_hash}")
        partial.rename(target)
        sync_directory(target.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _lock_exclusively(target: Path) -> Iterator[None]:
    """Hold the lock of `target`, and clear what killed downloads of it left."""
    lock = target.with_name(target.name + ".lock")
    while True:
        with lock.open("w") as file:
            with suppress(OSError):  # no locks on this file system: each for itself, and none in danger
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_same_file(lock, file):  # whoever held it before us removed it between our open and our lock
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
    """Make the names in it durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
