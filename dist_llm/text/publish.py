"""Publish a finished corpus: under a lock, atomically, and only over another corpus."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_llm.data.shard import MANIFEST
from dist_llm.errors import DataError


@contextmanager
def lock_output(out: Path) -> Iterator[None]:
    """Hold `OUT.lock`. Raises DataError if another run holds it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(out.name + ".lock")
    while True:
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{out}: another prepare is writing it. Wait for it or choose another --out.") from None
            # A run that just ended may have removed the file between our open and our lock.
            if not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def recover_output(out: Path, old: Path) -> None:
    """Repair `out` after a run that was killed while it replaced the old corpus by the new one."""
    if old.exists() and not out.exists():
        old.rename(out)
    if old.exists():
        shutil.rmtree(old)


def check_output(out: Path, overwrite: bool) -> None:
    """Raise DataError if `out` exists and `overwrite` is false, or if `out` is not a corpus."""
    if not out.exists():
        return
    if not overwrite:
        raise DataError(f"{out}: exists. Choose another --out, or give --overwrite to replace it.")
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out}: not a prepared corpus, so --overwrite will not replace it. Choose another --out.")


def publish_corpus(partial: Path, out: Path, old: Path) -> None:
    """Rename the complete corpus from `partial` to `out`, and sync both directories to the disk."""
    _sync_directory(partial)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    _sync_directory(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
