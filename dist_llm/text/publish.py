"""How a finished corpus gets to its place: alone, all or nothing, and never over what is no corpus."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_llm.data.shard import MANIFEST
from dist_llm.errors import DataError


@contextmanager
def sole_run(out: Path) -> Iterator[None]:
    """Hold `OUT.lock`. Raises DataError where another run holds it."""
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


def recover(out: Path, old: Path) -> None:
    """Put right what a run left that was killed while it swapped the old corpus for the new."""
    if old.exists() and not out.exists():
        old.rename(out)
    if old.exists():
        shutil.rmtree(old)


def refuse_to_destroy(out: Path, overwrite: bool) -> None:
    """Raise DataError where `out` exists and is not to be replaced, or is no corpus."""
    if not out.exists():
        return
    if not overwrite:
        raise DataError(f"{out}: exists. Choose another --out, or give --overwrite to replace it.")
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out}: not a prepared corpus, so --overwrite will not replace it. Choose another --out.")


def publish(partial: Path, out: Path, old: Path) -> None:
    """Put the complete corpus in its place, durably."""
    _sync(partial)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
