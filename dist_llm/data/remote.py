"""Fetch a URL into a file of the local cache, completely or not at all.

A download goes to a temporary file, which is checked for size and hash, synced and renamed. So a file with its final
name is complete, however many processes and machines share the cache and whenever they are killed. The lock only
prevents the processes of one machine from fetching a file twice. Correctness does not depend on it: the kernel releases
it when its holder dies, and a file system without locks works too.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from dist_llm.errors import DataError
from dist_llm.io.atomic import SUFFIX, open_replacement, remove
from dist_llm.io.hashing import create_hash, format_digest
from dist_llm.io.locks import lock_file
from dist_llm.io.urls import RemoteError, iter_blocks, with_retries

log = logging.getLogger("dist_llm")

ABANDONED_SECONDS = 3600.0  # a partial file without writes for this time has no writer


def fetch(url: str, target: Path, size: int | None, expected_hash: str | None) -> Path:
    """Return `target`. If it does not exist, fetch it from `url`, and check its size and hash if they are given.

    Raises DataError if the download fails or differs, or if it cannot be written.
    """
    if target.exists():
        return target
    hint = f"Check the URL, the network and your credentials, or copy the file by other means to {target}"
    with convert_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(target.with_name(target.name + ".lock"), required=False):
            _remove_abandoned(target.parent.glob(f"{target.name}.*{SUFFIX}"))
            if not target.exists():
                log.info("fetching %s (%s bytes)", url, f"{size:,}" if size else "unknown")
                with_retries(url, lambda: _download(url, target, size, expected_hash), lambda: hint)
    return target


@contextmanager
def convert_write_errors(target: Path) -> Iterator[None]:
    """Convert an OSError of the block to a DataError about the cache."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or target}: cannot be written: {error.strerror or error}. "
            "Free disk space, or set data.cache to a directory with enough space."
        ) from None


def _download(url: str, target: Path, size: int | None, expected_hash: str | None) -> None:
    digest, length = create_hash(expected_hash or "blake3:"), 0
    with open_replacement(target, shared=True) as file:
        for block in iter_blocks(url):
            file.write(block)
            digest.update(block)
            length += len(block)
        if size not in (None, length):
            raise RemoteError(f"received {length} bytes, but the manifest says {size}")
        if expected_hash not in (None, format_digest(digest)):
            raise RemoteError(f"received data with {format_digest(digest)}, but the manifest says {expected_hash}")


def _remove_abandoned(partials: Iterator[Path]) -> None:
    for partial in partials:
        with suppress(FileNotFoundError):
            if time.time() - partial.stat().st_mtime > ABANDONED_SECONDS:
                remove(partial)
