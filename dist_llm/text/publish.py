"""Publish a finished corpus: rename it to its final name atomically, under a lock, and replace nothing but a corpus."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dist_llm.data.shard import MANIFEST_FILE
from dist_llm.errors import DataError
from dist_llm.io.atomic import sync_directory
from dist_llm.io.locks import lock_file


@contextmanager
def lock_output(out: Path) -> Iterator[None]:
    """Lock `OUT.lock` during the `with` block. Raises DataError if another run has the lock."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_file(out.with_name(out.name + ".lock"), wait=False))
        except BlockingIOError:
            raise DataError(f"{out}: another prepare is writing it. Wait for it or choose another --out.") from None
        yield


def recover_output(out: Path, old: Path) -> None:
    """Restore `out` from `old` if a run was killed between the two renames of `publish_corpus`; remove `old`."""
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
    if not (out / MANIFEST_FILE).is_file():
        raise DataError(f"{out}: not a prepared corpus, so --overwrite will not replace it. Choose another --out.")


def publish_corpus(partial: Path, out: Path, old: Path) -> None:
    """Rename the complete corpus from `partial` to `out`. An existing corpus is renamed to `old` and then removed."""
    sync_directory(partial)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    sync_directory(out.parent)
    shutil.rmtree(old, ignore_errors=True)
