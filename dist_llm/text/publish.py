"""Publish a finished corpus: under a lock, atomically, and only over another corpus."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dist_llm.data.shard import MANIFEST
from dist_llm.errors import DataError
from dist_llm.io.atomic import sync_directory
from dist_llm.io.locks import lock_file


@contextmanager
def lock_output(out: Path) -> Iterator[None]:
    """Hold `OUT.lock`. Raises DataError if another run holds it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_file(out.with_name(out.name + ".lock"), wait=False))
        except BlockingIOError:
            raise DataError(f"{out}: another prepare is writing it. Wait for it or choose another --out.") from None
        yield


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
    sync_directory(partial)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    sync_directory(out.parent)
    shutil.rmtree(old, ignore_errors=True)
