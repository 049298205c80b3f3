"""A memory-mapped shard of token ids, and the errors of reading it."""

import errno
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_llm.errors import DataError

Tokens = npt.NDArray[Any]  # ids in the dtype of the corpus, uint16 or uint32


@contextmanager
def convert_read_errors(path: Path) -> Iterator[None]:
    """Convert an OSError of the block into a DataError that names `path` and says how to fix it."""
    try:
        yield
    except OSError as error:
        hint = "Prepare the corpus again"
        if error.errno in (errno.EACCES, errno.EPERM):
            hint = "Give this user read permission"
        elif error.errno in (errno.EMFILE, errno.ENFILE):
            hint = "Raise the limit of open files (ulimit -n)"
        raise DataError(f"{path}: cannot be read: {error.strerror}. {hint}.") from None


class MappedShard:
    """A memory-mapped shard: a header of `skip_bytes` bytes, and `num_tokens` ids of `dtype`.

    `first_token` is the position of its first token in the corpus.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], skip_bytes: int, num_tokens: int, first_token: int) -> None:
        self.first_token, self.num_tokens = first_token, num_tokens
        self.skip_bytes, self.itemsize = skip_bytes, dtype.itemsize
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        if not skip_bytes + num_tokens:  # an empty file cannot be mapped
            self.tokens: Tokens = np.empty(0, dtype)
            return
        content = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        # Windows are read at random, so the read-ahead of the kernel (megabytes on some machines) would be wasted.
        content.madvise(mmap.MADV_RANDOM)
        self.tokens = np.frombuffer(content, dtype, num_tokens, skip_bytes)

    def prefetch(self, start: int, window_tokens: int) -> None:
        """Ask the kernel to read the window that starts at token `start` of the corpus. Do not wait for the read."""
        offset = self.skip_bytes + (start - self.first_token) * self.itemsize
        os.posix_fadvise(self._file, offset, window_tokens * self.itemsize, os.POSIX_FADV_WILLNEED)
