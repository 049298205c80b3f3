"""One split of a prepared corpus, read as a single stream of tokens that may cross shards."""

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

from dist_llm.config.schema import CACHE, DataConfig
from dist_llm.data.mirror import localize, offsets_path, shard_path
from dist_llm.data.order import Ints
from dist_llm.data.remote import is_remote
from dist_llm.data.shard import Manifest, Split
from dist_llm.errors import DataError

MOST_MAPS = 256  # a map keeps its file open twice, and a process may often open only 1024
MEMORY_BYTES_PER_SECOND = 500e6
STATS_AT_ONCE, FETCHES_AT_ONCE = 32, 8

Tokens = npt.NDArray[Any]  # of the corpus's own unsigned type


@dataclass(frozen=True)
class Document:
    """Number `number` of shard `shard`: tokens [start, end) of the corpus; its prompt ends before `completion`."""

    shard: int
    number: int
    start: int
    end: int
    completion: int


class Corpus:
    """Memory-mapped shards. Nothing is read at start but the manifest; shards open on first use.

    Shards that are far away are fetched then, into `cache`.
    """

    def __init__(self, directory: Path, split: Split = "train", verify: str = "size", cache: str = CACHE) -> None:
        self.directory, self.split, self.cache = directory, split, cache
        self.manifest = Manifest.load(directory)
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self.shards = self.manifest.shards[split]
        self.ends: Ints = np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)
        self.n_tokens = self.manifest.tokens(split)
        self._far = {number for number, shard in enumerate(self.shards) if is_remote(shard.file)}
        self._maps: dict[int, _Mapped] = {}
        self._documents = lru_cache(MOST_MAPS)(self._map_documents)
        self._from_disk = True  # until a batch shows that its shards are in memory: then nothing need be announced
        if verify == "hash":
            for number in range(len(self.shards)):
                self._verify(number)

    @staticmethod
    def of(data: DataConfig, split: Split = "train") -> "Corpus":
        """The corpus that the config names, here or far away. Raises DataError where there is none."""
        return Corpus(localize(data.path, data.cache), split, data.verify, data.cache)

    def n_windows(self, window: int, stride: int) -> int:
        """How many windows of `window` tokens fit, each `stride` after the one before."""
        return max(0, (self.n_tokens - window) // stride + 1)

    def read(self, starts: Ints, length: int) -> Tokens:
        """Rows [len(starts), length] of ids, in the corpus's own type.

        Raises DataError, with file and offset, for an id that the tokenizer does not know.
        """
        rows = np.empty((len(starts), length), self.dtype)
        numbers = self.ends.searchsorted(starts, "right")
        if self._far:
            self._bring(self._far.intersection(numbers.tolist()) - self._maps.keys())
        for group in (slice(at, at + MOST_MAPS) for at in range(0, len(rows), MOST_MAPS)):
            self._copy(rows[group], starts[group].tolist(), numbers[group].tolist())
        if rows.size and rows.max() >= self.manifest.vocab_size:
            self._refuse_id(rows, starts)
        return rows

    def _copy(self, rows: Tokens, starts: list[int], numbers: list[int]) -> None:
        """Fill row i from token starts[i] on, which lies in shard numbers[i]; at most MOST_MAPS rows."""
        length, shards = rows.shape[1], [self._open(number) for number in numbers]
        if self._from_disk:
            for start, shard in zip(starts, shards, strict=True):
                shard.announce(start, length)
        begin = time.perf_counter()
        for row, start, shard, number in zip(rows, starts, shards, numbers, strict=True):
            start -= shard.first
            if (fits := shard.n_tokens - start) >= length:
                row[:] = shard.tokens[start : start + length]
                continue
            row[:fits] = shard.tokens[start:]
            while fits < length:  # the window goes on in the next shard
                number += 1
                piece = self._open(number).tokens[: length - fits]
                row[fits : fits + len(piece)] = piece
                fits += len(piece)
        # What was copied slower than any memory's pace came from a disk, and so will what follows.
        self._from_disk = rows.nbytes < (time.perf_counter() - begin) * MEMORY_BYTES_PER_SECOND

    def _bring(self, far: set[int]) -> None:
        """Fetch these shards, several at a time: the windows of a shuffled batch lie in as many."""
        with ThreadPoolExecutor(FETCHES_AT_ONCE) as pool:
            for _ in pool.map(self._check_size, far):
                pass

    def _open(self, number: int) -> "_Mapped":
        if (found := self._maps.get(number)) is not None:
            return found
        path, shard = self._check_size(number), self.shards[number]
        if len(self._maps) == MOST_MAPS:
            del self._maps[next(iter(self._maps))]
        first = int(self.ends[number]) - shard.tokens
        with _reading(path):
            self._maps[number] = mapped = _Mapped(path, self.dtype, shard.skip_bytes, shard.tokens, first)
        return mapped

    def offsets(self, number: int) -> npt.NDArray[np.uint64]:
        """Where in shard `number` its documents begin. Raises DataError where the file is not as promised."""
        return self._documents(number)[:, 0]

    def _map_documents(self, number: int) -> npt.NDArray[np.uint64]:
        """[documents, 1]: their first tokens in shard `number`; [documents, 2]: and the first after their prompts."""
        shard = self.shards[number]
        columns = 2 if self.manifest.prompts else 1
        want = 8 * columns * shard.documents
        path = offsets_path(self.directory, shard, want, self.cache)
        self._measure(path, want, f"{columns * shard.documents} offsets of uint64")
        # Mapped: of a large shard few are looked at.
        with _reading(path):
            flat = np.memmap(path, "<u8", "r") if want else np.empty(0, "<u8")
        return flat.reshape(-1, columns)

    def document_starts(self, number: int, first: int, last: int) -> Ints:
        """Where documents [first, last) of shard `number` begin. Raises DataError unless they ascend within it."""
        found = self.offsets(number)[first:last].astype(np.int64)
        if len(found) and (found[0] < 0 or found[-1] >= self.shards[number].tokens or (np.diff(found) <= 0).any()):
            self._refuse_offsets(number)
        return found

    def scored(self, starts: Ints, length: int) -> npt.NDArray[np.bool_]:
        """Rows [len(starts), length]: which tokens of these windows are of no prompt."""
        rows = np.ones((len(starts), length), bool)
        for row, start in zip(rows, starts.tolist(), strict=True):
            for document in self.overlapping(start, length):
                row[max(document.start - start, 0) : max(document.completion - start, 0)] = False
        return rows

    def document_numbers(self, starts: Ints, length: int) -> Ints:
        """Rows [len(starts), length]: the number of each token's document within its window, from 0."""
        begins = np.zeros((len(starts), length), np.int64)
        for row, start in zip(begins, starts.tolist(), strict=True):
            first, last = np.searchsorted(self.ends, (start, start + length - 1), side="right").tolist()
            for shard in range(first, last + 1):
                offset = int(self.ends[shard]) - self.shards[shard].tokens - start  # of the shard, within the window
                offsets = self.offsets(shard)
                # Keys of the offsets' own type: for others searchsorted copies the whole file.
                inside = np.searchsorted(offsets, np.array([max(1 - offset, 0), max(length - offset, 0)], np.uint64))
                found = self.document_starts(shard, *inside.tolist()) + offset
                if len(found) and not 0 < found[0] <= found[-1] < length:
                    self._refuse_offsets(shard)
                row[found] = 1
        return np.cumsum(begins, axis=1)

    def check_document_bounds(self) -> None:
        """Raises DataError where no file of the corpus says where its documents begin."""
        if not self.manifest.has_document_bounds:
            raise DataError(
                f"{self.directory}: says nowhere where documents begin: the adopted files have no index, and no "
                "<|endoftext|> is in them. Set data.document_mask to false and data.windows to stream; or tokenize "
                "the text again with a separator, and adopt or prepare it again"
            )

    def overlapping(self, start: int, length: int) -> Iterator[Document]:
        """The documents that have tokens in [start, start + length)."""
        numbers = np.searchsorted(self.ends, (start, start + length - 1), side="right").tolist()
        for shard in range(numbers[0], numbers[1] + 1):
            begin = int(self.ends[shard]) - self.shards[shard].tokens
            documents = self._documents(shard)
            first, end = np.searchsorted(documents[:, 0], (max(start - begin, 0), start + length - 1 - begin), "right")
            for number in range(max(int(first) - 1, 0), int(end)):
                last = number + 1 == len(documents)
                stop = self.shards[shard].tokens if last else int(documents[number + 1, 0])
                found, completion = int(documents[number, 0]), int(documents[number, -1])
                if not (found <= completion <= stop and found < stop <= self.shards[shard].tokens):
                    self._refuse_offsets(shard)
                yield Document(shard, number, begin + found, begin + stop, begin + completion)

    def _check_size(self, number: int) -> Path:
        shard = self.shards[number]
        want = shard.skip_bytes + shard.tokens * self.dtype.itemsize
        path = shard_path(self.directory, shard, want, self.cache)
        header = f" after a header of {shard.skip_bytes} bytes" if shard.skip_bytes else ""
        return self._measure(path, want, f"{shard.tokens} tokens of {self.manifest.dtype}{header}")

    def _measure(self, path: Path, want: int, what: str) -> Path:
        with _reading(path):
            status = path.stat()
            found = status.st_size
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if found != want:
            kind = "truncated" if found < want else "too long"
            raise DataError(
                f"{path}: {kind} at byte {min(found, want)}: {found} bytes, but the manifest promises {want} "
                f"({what}). Copy it again or prepare the corpus again."
            )
        return path

    def check_sizes(self) -> None:
        """Stat every shard that is here: a truncated one is found now and not in the middle of a run."""
        near = [number for number in range(len(self.shards)) if number not in self._far]
        # Many at once, since on a network's file system each answer takes a millisecond or more.
        with ThreadPoolExecutor(STATS_AT_ONCE) as pool:
            for _ in pool.map(self._check_size, near):
                pass

    def _verify(self, number: int) -> None:
        path = self._check_size(number)
        with _reading(path), path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.shards[number].sha256:
            raise DataError(
                f"{path}: bytes 0 to {path.stat().st_size} have sha256 {found}, but the manifest promises "
                f"{self.shards[number].sha256}. Copy it again or prepare the corpus again."
            )

    def _refuse_offsets(self, number: int) -> NoReturn:
        shard = self.shards[number]
        raise DataError(
            f"{self.directory / shard.offsets_file}: document offsets do not ascend within the {shard.tokens} tokens "
            f"of {shard.file}. The file is damaged: copy it again or prepare the corpus again."
        )

    def _refuse_id(self, rows: Tokens, starts: Ints) -> None:
        row, column = np.argwhere(rows >= self.manifest.vocab_size)[0].tolist()
        position = int(starts[row]) + column
        number = int(np.searchsorted(self.ends, position, side="right"))
        shard = self.shards[number]
        inside = position - (int(self.ends[number]) - shard.tokens)
        raise DataError(
            f"{self._check_size(number)}: token {inside} (byte {shard.skip_bytes + inside * self.dtype.itemsize}) is "
            f"{rows[row, column]}, but the tokenizer has {self.manifest.vocab_size} ids. "
            "The shard is damaged or of another tokenizer: prepare the corpus again."
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Within the block an OSError is one of the file, and a DataError to the user."""
    try:
        yield
    except OSError as error:
        way_out = "Prepare the corpus again"
        if error.errno in (errno.EACCES, errno.EPERM):
            way_out = "Give this user the right to read it"
        elif error.errno in (errno.EMFILE, errno.ENFILE):
            way_out = "Raise the limit of open files (ulimit -n)"
        raise DataError(f"{path}: cannot be read: {error.strerror}. {way_out}.") from None


class _Mapped:
    """One shard in memory, whose first token is number `first` of the corpus."""

    def __init__(self, path: Path, dtype: np.dtype[Any], skip_bytes: int, tokens: int, first: int) -> None:
        self.first, self.n_tokens, self.skip_bytes, self.itemsize = first, tokens, skip_bytes, dtype.itemsize
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        if not skip_bytes + tokens:  # nothing cannot be mapped
            self.tokens: Tokens = np.empty(0, dtype)
            return
        content = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ)
        # Windows are read at random: to read on beyond one, megabytes on some machines, would be in vain.
        content.madvise(mmap.MADV_RANDOM)
        self.tokens = np.frombuffer(content, dtype, tokens, skip_bytes)

    def announce(self, start: int, length: int) -> None:
        """Have the kernel read the window that starts at token `start`, and do not wait for it."""
        offset = self.skip_bytes + (start - self.first) * self.itemsize
        os.posix_fadvise(self._file, offset, length * self.itemsize, os.POSIX_FADV_WILLNEED)
