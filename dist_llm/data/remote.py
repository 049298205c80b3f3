"""Fetch a URL into a file of the local cache, atomically.

A download goes to a temporary file. The file is checked for size and hash, synced to the disk and renamed. So a file
with its final name is complete, also if processes share the cache or are killed. A lock prevents the processes of one
machine from downloading the same file twice. Correctness does not depend on the lock, so a file system without locks
works too.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_llm.errors import DataError
from dist_llm.io.atomic import PARTIAL_SUFFIX, open_replacement, remove
from dist_llm.io.hashing import create_hash, format_digest
from dist_llm.io.locks import lock_file
from dist_llm.io.urls import RemoteError, iter_blocks, with_retries

log = logging.getLogger("dist_llm")

ABANDONED_SECONDS = 3600.0  # a partial file without writes for this time has no writer


def fetch(url: str, target: Path, expected_bytes: int | None, expected_hash: str | None) -> Path:
    """Download `url` to `target` unless `target` exists. Return `target`.

    The size and the hash are checked if they are given. Raises DataError if the download fails, has another size or
    hash, or cannot be written.
    """
    if target.exists():
        return target
    hint = f"Check the URL, the network and your credentials, or copy the file by other means to {target}"
    with convert_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(target.with_name(target.name + ".lock"), required=False):
            _remove_abandoned(target.parent.glob(f"{target.name}.*{PARTIAL_SUFFIX}"))
            if not target.exists():
                log.info("fetching %s (%s bytes)", url, f"{expected_bytes:,}" if expected_bytes else "unknown")
                with_retries(url, lambda: _download(url, target, expected_bytes, expected_hash), lambda: hint)
    return target


@contextmanager
def convert_write_errors(target: Path) -> Iterator[None]:
    """Convert an OSError of the `with` block to a DataError about the cache."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or target}: cannot be written: {error.strerror or error}. "
            "Free disk space, or set data.cache to a directory with enough space."
        ) from None


def _download(url: str, target: Path, expected_bytes: int | None, expected_hash: str | None) -> None:
    digest, num_bytes = create_hash(expected_hash or "blake3:"), 0
    with open_replacement(target, shared=True) as file:
        for block in iter_blocks(url):
            file.write(block)
            digest.update(block)
            num_bytes += len(block)
        if expected_bytes not in (None, num_bytes):
            raise RemoteError(f"received {num_bytes} bytes, but the manifest says {expected_bytes}")
        if expected_hash not in (None, format_digest(digest)):
            raise RemoteError(f"received data with {format_digest(digest)}, but the manifest says {expected_hash}")


def _remove_abandoned(partials: Iterator[Path]) -> None:
    """Remove the partial files of killed processes."""
    for partial in partials:
        with suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                remove(partial)
