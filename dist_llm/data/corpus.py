"""Read one split of a prepared corpus as a single stream of tokens. A read may cross shard boundaries."""

import errno
import hashlib
import mmap
import os
import stat
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from dist_llm.config.data_sections import CACHE, DataConfig
from dist_llm.data.mirror import localize_corpus, locate_offsets, locate_shard
from dist_llm.data.order import Ints
from dist_llm.data.shard import Manifest, Split
from dist_llm.errors import DataError
from dist_llm.io.urls import is_remote

MAX_MAPPED_SHARDS = 256  # each mapping holds two file descriptors, and the limit per process is often 1024
MEMORY_BYTES_PER_SECOND = 500e6
STAT_THREADS, FETCH_THREADS = 32, 8

Tokens = npt.NDArray[Any]  # in the corpus's dtype, uint16 or uint32


@dataclass(frozen=True)
class Document:
    """Document `index` of shard `shard`: tokens [start, end) of the corpus. Its prompt ends before token
    `completion`."""

    shard: int
    index: int
    start: int
    end: int
    completion: int


class Corpus:
    """The memory-mapped shards of one split.

    Opening it reads only the manifest. A shard is mapped on first use; a remote shard is fetched into `cache` first.
    """

    def __init__(self, directory: Path, split: Split = "train", verify: str = "size", cache: str = CACHE) -> None:
        self.directory, self.split, self.cache = directory, split, cache
        self.manifest = Manifest.load(directory)
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self.shards = self.manifest.shards[split]
        self.shard_ends: Ints = np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)
        self.n_tokens = self.manifest.tokens(split)
        self._remote_shards = {index for index, shard in enumerate(self.shards) if is_remote(shard.file)}
        self._mapped_shards: dict[int, _MappedShard] = {}
        self._cached_documents = lru_cache(MAX_MAPPED_SHARDS)(self._map_documents)
        self._reads_from_disk = True  # False once a batch is read at memory speed; then nothing is prefetched
        if verify == "hash":
            for index in range(len(self.shards)):
                self._verify_hash(index)

    @staticmethod
    def from_config(data: DataConfig, split: Split = "train") -> "Corpus":
        """Open the corpus of `data.path`, local or remote. Raises DataError if there is none."""
        return Corpus(localize_corpus(data.path, data.cache), split, data.verify, data.cache)

    def count_windows(self, window: int, stride: int) -> int:
        """Return how many windows of `window` tokens fit if consecutive windows start `stride` tokens apart."""
        return max(0, (self.n_tokens - window) // stride + 1)

    def read(self, starts: Ints, length: int) -> Tokens:
        """Return token ids [len(starts), length] in the corpus's dtype.

        Raises DataError, with file and byte offset, if an id is outside the tokenizer's vocabulary.
        """
        rows = np.empty((len(starts), length), self.dtype)
        indices = self.shard_ends.searchsorted(starts, "right")
        if self._remote_shards:
            self._fetch_shards(self._remote_shards.intersection(indices.tolist()) - self._mapped_shards.keys())
        for group in (slice(at, at + MAX_MAPPED_SHARDS) for at in range(0, len(rows), MAX_MAPPED_SHARDS)):
            self._copy_windows(rows[group], starts[group].tolist(), indices[group].tolist())
        if rows.size and rows.max() >= self.manifest.vocab_size:
            self._raise_bad_token_id(rows, starts)
        return rows

    def _copy_windows(self, rows: Tokens, starts: list[int], indices: list[int]) -> None:
        """Copy the window at token starts[i], which begins in shard indices[i], to row i. At most MAX_MAPPED_SHARDS
        rows."""
        length, shards = rows.shape[1], [self._map_shard(index) for index in indices]
        if self._reads_from_disk:
            for start, shard in zip(starts, shards, strict=True):
                shard.prefetch(start, length)
        begin = time.perf_counter()
        for row, start, shard, index in zip(rows, starts, shards, indices, strict=True):
            start -= shard.first
            if (filled := shard.n_tokens - start) >= length:
                row[:] = shard.tokens[start : start + length]
                continue
            row[:filled] = shard.tokens[start:]
            while filled < length:  # the window continues in the next shard
                index += 1
                rest = self._map_shard(index).tokens[: length - filled]
                row[filled : filled + len(rest)] = rest
                filled += len(rest)
        # A copy slower than memory bandwidth came from disk, and the next batch probably does too.
        self._reads_from_disk = rows.nbytes < (time.perf_counter() - begin) * MEMORY_BYTES_PER_SECOND

    def _fetch_shards(self, shard_indices: set[int]) -> None:
        """Fetch these remote shards in parallel. A shuffled batch reads from as many shards as it has windows."""
        with ThreadPoolExecutor(FETCH_THREADS) as pool:
            for _ in pool.map(self._locate_shard, shard_indices):
                pass

    def _map_shard(self, index: int) -> "_MappedShard":
        if (mapped := self._mapped_shards.get(index)) is not None:
            return mapped
        path, shard = self._locate_shard(index), self.shards[index]
        if len(self._mapped_shards) == MAX_MAPPED_SHARDS:
            del self._mapped_shards[next(iter(self._mapped_shards))]
        first = int(self.shard_ends[index]) - shard.tokens
        with _convert_read_errors(path):
            self._mapped_shards[index] = mapped = _MappedShard(path, self.dtype, shard.skip_bytes, shard.tokens, first)
        return mapped

    def document_offsets(self, index: int) -> npt.NDArray[np.uint64]:
        """Return the first token of each document of shard `index`. Raises DataError if the offsets file is damaged."""
        return self._cached_documents(index)[:, 0]

    def _map_documents(self, index: int) -> npt.NDArray[np.uint64]:
        """Return [documents, 1 or 2]: each document's first token within the shard and, with prompts, its first
        completion token."""
        shard = self.shards[index]
        columns = 2 if self.manifest.prompts else 1
        expected = 8 * columns * shard.documents
        path = locate_offsets(self.directory, shard, expected, self.cache)
        self._check_file_size(path, expected, f"{columns * shard.documents} offsets of uint64")
        # Mapped, because few documents of a large shard are read.
        with _convert_read_errors(path):
            flat = np.memmap(path, "<u8", "r") if expected else np.empty(0, "<u8")
        return flat.reshape(-1, columns)

    def read_document_starts(self, index: int, first: int, last: int) -> Ints:
        """Return the first tokens of documents [first, last) of shard `index`. Raises DataError unless they ascend
        within it."""
        starts = self.document_offsets(index)[first:last].astype(np.int64)
        if len(starts) and (starts[0] < 0 or starts[-1] >= self.shards[index].tokens or (np.diff(starts) <= 0).any()):
            self._raise_bad_offsets(index)
        return starts

    def compute_loss_mask(self, starts: Ints, length: int) -> npt.NDArray[np.bool_]:
        """Return [len(starts), length]: True for the tokens of these windows that are not in a prompt."""
        rows = np.ones((len(starts), length), bool)
        for row, start in zip(rows, starts.tolist(), strict=True):
            for document in self.iter_documents(start, length):
                row[max(document.start - start, 0) : max(document.completion - start, 0)] = False
        return rows

    def compute_document_ids(self, starts: Ints, length: int) -> Ints:
        """Return [len(starts), length]: the id of each token's document, counted from 0 within its window."""
        is_first = np.zeros((len(starts), length), np.int64)
        for row, start in zip(is_first, starts.tolist(), strict=True):
            first, last = np.searchsorted(self.shard_ends, (start, start + length - 1), side="right").tolist()
            for shard in range(first, last + 1):
                # position of the shard within the window
                offset = int(self.shard_ends[shard]) - self.shards[shard].tokens - start
                offsets = self.document_offsets(shard)
                # Search keys have the dtype of the offsets: otherwise searchsorted copies the whole file.
                inside = np.searchsorted(offsets, np.array([max(1 - offset, 0), max(length - offset, 0)], np.uint64))
                starts_in_window = self.read_document_starts(shard, *inside.tolist()) + offset
                if len(starts_in_window) and not 0 < starts_in_window[0] <= starts_in_window[-1] < length:
                    self._raise_bad_offsets(shard)
                row[starts_in_window] = 1
        return np.cumsum(is_first, axis=1)

    def check_document_bounds(self) -> None:
        """Raise DataError if no file of the corpus records where documents begin."""
        if not self.manifest.has_document_bounds:
            raise DataError(
                f"{self.directory}: document boundaries are unknown: the adopted files have no index and contain no "
                "<|endoftext|>. Set data.document_mask to false and data.windows to stream; or tokenize the text "
                "again with a separator, and adopt or prepare it again"
            )

    def iter_documents(self, start: int, length: int) -> Iterator[Document]:
        """Yield the documents that have tokens in [start, start + length)."""
        indices = np.searchsorted(self.shard_ends, (start, start + length - 1), side="right").tolist()
        for shard in range(indices[0], indices[1] + 1):
            begin = int(self.shard_ends[shard]) - self.shards[shard].tokens
            documents = self._cached_documents(shard)
            first, end = np.searchsorted(documents[:, 0], (max(start - begin, 0), start + length - 1 - begin), "right")
            for index in range(max(int(first) - 1, 0), int(end)):
                last = index + 1 == len(documents)
                stop = self.shards[shard].tokens if last else int(documents[index + 1, 0])
                start_in_shard, completion = int(documents[index, 0]), int(documents[index, -1])
                if not (start_in_shard <= completion <= stop and start_in_shard < stop <= self.shards[shard].tokens):
                    self._raise_bad_offsets(shard)
                yield Document(shard, index, begin + start_in_shard, begin + stop, begin + completion)

    def _locate_shard(self, index: int) -> Path:
        """Return the path of shard `index`, fetched if it is remote. Raises DataError if its size is not the
        manifest's."""
        shard = self.shards[index]
        expected = shard.skip_bytes + shard.tokens * self.dtype.itemsize
        path = locate_shard(self.directory, shard, expected, self.cache)
        header = f" after a header of {shard.skip_bytes} bytes" if shard.skip_bytes else ""
        return self._check_file_size(path, expected, f"{shard.tokens} tokens of {self.manifest.dtype}{header}")

    def _check_file_size(self, path: Path, expected: int, what: str) -> Path:
        with _convert_read_errors(path):
            status = path.stat()
            size = status.st_size
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if size != expected:
            kind = "truncated" if size < expected else "too long"
            raise DataError(
                f"{path}: {kind} at byte {min(size, expected)}: {size} bytes, but the manifest says {expected} "
                f"({what}). Copy it again or prepare the corpus again."
            )
        return path

    def check_shard_sizes(self) -> None:
        """Check the sizes of all local shards, to find a truncated shard at the start instead of during the run."""
        local_shards = [index for index in range(len(self.shards)) if index not in self._remote_shards]
        # In parallel, because a stat call on a network file system takes a millisecond or more.
        with ThreadPoolExecutor(STAT_THREADS) as pool:
            for _ in pool.map(self._locate_shard, local_shards):
                pass

    def _verify_hash(self, index: int) -> None:
        path = self._locate_shard(index)
        with _convert_read_errors(path), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != self.shards[index].sha256:
            raise DataError(
                f"{path}: bytes 0 to {path.stat().st_size} have sha256 {digest}, but the manifest says "
                f"{self.shards[index].sha256}. Copy it again or prepare the corpus again."
            )

    def _raise_bad_offsets(self, index: int) -> NoReturn:
        shard = self.shards[index]
        raise DataError(
            f"{self.directory / shard.offsets_file}: document offsets do not ascend within the {shard.tokens} tokens "
            f"of {shard.file}. The file is damaged: copy it again or prepare the corpus again."
        )

    def _raise_bad_token_id(self, rows: Tokens, starts: Ints) -> None:
        row, column = np.argwhere(rows >= self.manifest.vocab_size)[0].tolist()
        position = int(starts[row]) + column
        index = int(np.searchsorted(self.shard_ends, position, side="right"))
        shard = self.shards[index]
        inside = position - (int(self.shard_ends[index]) - shard.tokens)
        raise DataError(
            f"{self._locate_shard(index)}: token {inside} (byte {shard.skip_bytes + inside * self.dtype.itemsize}) is "
            f"{rows[row, column]}, but the tokenizer has {self.manifest.vocab_size} ids. "
            "The shard is damaged or of another tokenizer: prepare the corpus again."
        )


@contextmanager
def _convert_read_errors(path: Path) -> Iterator[None]:
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


class _MappedShard:
    """A memory-mapped shard. `first` is the position of its first token in the corpus."""

    def __init__(self, path: Path, dtype: np.dtype[Any], skip_bytes: int, tokens: int, first: int) -> None:
        self.first, self.n_tokens, self.skip_bytes, self.itemsize = first, tokens, skip_bytes, dtype.itemsize
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        if not skip_bytes + tokens:  # an empty file cannot be mapped
            self.tokens: Tokens = np.empty(0, dtype)
            return
        content = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        # Windows are read at random, so the kernel's read-ahead (megabytes on some machines) would be wasted.
        content.madvise(mmap.MADV_RANDOM)
        self.tokens = np.frombuffer(content, dtype, tokens, skip_bytes)

    def prefetch(self, start: int, length: int) -> None:
        """Ask the kernel to read the window that starts at token `start`, without waiting for it."""
        offset = self.skip_bytes + (start - self.first) * self.itemsize
        os.posix_fadvise(self._file, offset, length * self.itemsize, os.POSIX_FADV_WILLNEED)
