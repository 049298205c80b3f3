"""Locations of files: a path, a file:// URL, or the URL of a remote file. Remote files are read in blocks.

`with_retries` repeats a read after a temporary error.
"""

import logging
import re
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.client import HTTPResponse
from pathlib import Path
from typing import IO, TypeVar
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

from dist_llm.errors import DataError

log = logging.getLogger("dist_llm")
Result = TypeVar("Result")

BLOCK_BYTES = 1 << 22  # bytes per read of a remote file
MAX_TRIES = 4  # including the first
TIMEOUT_SECONDS = 60.0  # of a connection, and of a read
PAUSE_SECONDS = 1.0  # pause after the first try; it doubles after each try
RETRYABLE_STATUSES = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}


class RemoteError(Exception):
    """A read of a remote file failed. `is_permanent`: a retry would fail too."""

    def __init__(self, message: str, is_permanent: bool = False) -> None:
        super().__init__(message)
        self.is_permanent = is_permanent


def is_remote(location: str) -> bool:
    """Return whether `location` is a URL that is not a file:// URL."""
    return re.match("[A-Za-z][A-Za-z0-9+.-]+://", location) is not None and not location.startswith("file://")


def as_path(location: str) -> Path:
    """Convert a path or a file:// URL to a Path."""
    return Path(unquote(urlsplit(location).path)) if location.startswith("file://") else Path(location)


def iter_blocks(url: str) -> Iterator[bytes]:
    """Yield the content of `url` in blocks. Raises RemoteError if it cannot be read or the connection ends early."""
    try:
        with _open_url(url) as file:
            while block := file.read(BLOCK_BYTES):
                yield block
            if isinstance(file, HTTPResponse) and file.length:  # bytes that have not arrived
                raise OSError(f"the connection ended {file.length} bytes early")
    except HTTPError as error:
        error.close()
        is_permanent = error.code < HTTPStatus.INTERNAL_SERVER_ERROR and error.code not in RETRYABLE_STATUSES
        raise RemoteError(f"HTTP status {error.code} {error.reason}", is_permanent) from None
    except Exception as error:  # each fsspec backend raises its own exceptions
        is_permanent = isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError)
        raise RemoteError(f"{type(error).__name__}: {error}", is_permanent) from None


def _open_url(url: str) -> IO[bytes]:
    # The http backend of fsspec needs aiohttp and starts a thread. The standard library does not.
    if url.startswith(("http://", "https://")):
        return urlopen(url, timeout=TIMEOUT_SECONDS)
    import fsspec

    return fsspec.open(url, "rb").open()


def with_retries(url: str, action: Callable[[], Result], hint: Callable[[], str]) -> Result:
    """Return the result of `action`, which reads `url`. Repeat it after a RemoteError that is not permanent.

    Raises DataError with the URL and the hint after a permanent error or MAX_TRIES tries.
    """
    for attempt in range(MAX_TRIES):
        try:
            return action()
        except RemoteError as error:
            if error.is_permanent or attempt == MAX_TRIES - 1:
                tries = "" if error.is_permanent else f" in {MAX_TRIES} tries"
                raise DataError(f"{url}: cannot be fetched{tries}: {error}. {hint()}") from None
            log.warning("%s: %s; trying again", url, error)
        time.sleep(PAUSE_SECONDS * 2**attempt)
    raise AssertionError("the last try returns or raises")
