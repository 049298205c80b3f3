"""Read one split of a prepared corpus as one sequence of tokens. A read may cross shard boundaries."""

import errno
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from dist_llm.config.data_sections import CACHE, DataConfig
from dist_llm.data.mapped_shard import MappedShard, Tokens, convert_read_errors
from dist_llm.data.mirror import fetch_offsets, fetch_shard, localize_corpus
from dist_llm.data.order import Ints
from dist_llm.data.shard import CorpusManifest, Split
from dist_llm.errors import DataError
from dist_llm.io.urls import is_remote

MAX_MAPPED_SHARDS = 256  # a mapping has two file descriptors, and the limit per process is often 1024
MEMORY_BYTES_PER_SECOND = 500e6  # a slower copy counts as a read from the disk
NUM_STAT_THREADS = 32  # threads that check the sizes of files
NUM_FETCH_THREADS = 8  # threads that download shards


@dataclass(frozen=True)
class DocumentLocation:
    """The location of a document in a corpus. Token positions count from the first token of the corpus."""

    shard: int  # index of the shard
    index: int  # index of the document in the shard
    start: int  # first token
    end: int  # token after the last token
    completion: int  # first token after the prompt; `start` without a prompt


class Corpus:
    """The memory-mapped shards of one split.

    Opening it reads only the manifest. A shard is mapped on first use; a remote shard is fetched into `cache` first.
    """

    def __init__(self, directory: Path, split: Split = "train", verify: str = "size", cache: str = CACHE) -> None:
        self.directory, self.split, self.cache = directory, split, cache
        self.manifest = CorpusManifest.load(directory)
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self.shards = self.manifest.shards[split]
        # For each shard, the position in the corpus after its last token.
        self.shard_ends: Ints = np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)
        self.num_tokens = self.manifest.count_tokens(split)
        self._remote_shards = {index for index, shard in enumerate(self.shards) if is_remote(shard.file)}
        self._mapped_shards: dict[int, MappedShard] = {}
        self._cached_documents = lru_cache(MAX_MAPPED_SHARDS)(self._map_documents)
        self._reads_from_disk = True  # whether the latest batch came from the disk; then the next one is prefetched
        if verify == "hash":
            for index in range(len(self.shards)):
                self._verify_hash(index)

    @staticmethod
    def from_config(data: DataConfig, split: Split = "train") -> "Corpus":
        """Open the corpus of `data.path`, local or remote. Raises DataError if there is none."""
        return Corpus(localize_corpus(data.path, data.cache), split, data.verify, data.cache)

    def get_shard_start(self, index: int) -> int:
        """Return the position in the corpus of the first token of shard `index`."""
        return int(self.shard_ends[index]) - self.shards[index].tokens

    def count_windows(self, window_tokens: int, stride: int) -> int:
        """Return the number of windows of `window_tokens` tokens whose starts are `stride` tokens apart."""
        return max(0, (self.num_tokens - window_tokens) // stride + 1)

    def read(self, starts: Ints, window_tokens: int) -> Tokens:
        """Read one window of `window_tokens` tokens from each start. Return ids [len(starts), window_tokens].

        Raises DataError, with file and byte offset, if an id is not below the vocabulary size of the tokenizer.
        """
        windows = np.empty((len(starts), window_tokens), self.dtype)
        shard_indices = self.shard_ends.searchsorted(starts, "right")
        if self._remote_shards:
            self._fetch_shards(self._remote_shards.intersection(shard_indices.tolist()) - self._mapped_shards.keys())
        for first_row in range(0, len(windows), MAX_MAPPED_SHARDS):
            rows = slice(first_row, first_row + MAX_MAPPED_SHARDS)
            self._copy_windows(windows[rows], starts[rows].tolist(), shard_indices[rows].tolist())
        if windows.size and windows.max() >= self.manifest.vocab_size:
            self._raise_bad_token_id(windows, starts)
        return windows

    def _copy_windows(self, windows: Tokens, starts: list[int], shard_indices: list[int]) -> None:
        """Copy tokens to `windows`. Window i starts at token starts[i] of the corpus, in shard shard_indices[i].

        There are at most MAX_MAPPED_SHARDS windows, so all their shards can be mapped at the same time.
        """
        window_tokens, shards = windows.shape[1], [self._map_shard(index) for index in shard_indices]
        if self._reads_from_disk:
            for start, shard in zip(starts, shards, strict=True):
                shard.prefetch(start, window_tokens)
        start_time = time.perf_counter()
        for window, start, shard, shard_index in zip(windows, starts, shards, shard_indices, strict=True):
            start_in_shard = start - shard.first_token
            num_copied = shard.num_tokens - start_in_shard
            if num_copied >= window_tokens:
                window[:] = shard.tokens[start_in_shard : start_in_shard + window_tokens]
                continue
            window[:num_copied] = shard.tokens[start_in_shard:]
            while num_copied < window_tokens:  # the window continues in the next shard
                shard_index += 1
                tokens = self._map_shard(shard_index).tokens[: window_tokens - num_copied]
                window[num_copied : num_copied + len(tokens)] = tokens
                num_copied += len(tokens)
        # A copy below memory speed came from the disk, and the next batch will probably come from the disk.
        copy_seconds = time.perf_counter() - start_time
        self._reads_from_disk = windows.nbytes < copy_seconds * MEMORY_BYTES_PER_SECOND

    def _fetch_shards(self, shard_indices: set[int]) -> None:
        """Fetch these remote shards in parallel. The windows of a shuffled batch are in different shards."""
        with ThreadPoolExecutor(NUM_FETCH_THREADS) as pool:
            for _ in pool.map(self._fetch_shard, shard_indices):
                pass

    def _map_shard(self, index: int) -> MappedShard:
        """Map shard `index`. If MAX_MAPPED_SHARDS are mapped, unmap the one that was mapped first."""
        if (mapped := self._mapped_shards.get(index)) is not None:
            return mapped
        path, shard = self._fetch_shard(index), self.shards[index]
        if len(self._mapped_shards) == MAX_MAPPED_SHARDS:
            del self._mapped_shards[next(iter(self._mapped_shards))]
        with convert_read_errors(path):
            mapped = MappedShard(path, self.dtype, shard.skip_bytes, shard.tokens, self.get_shard_start(index))
        self._mapped_shards[index] = mapped
        return mapped

    def get_document_offsets(self, index: int) -> npt.NDArray[np.uint64]:
        """Return the first token of each document of shard `index`. Raises DataError if the offsets file is damaged."""
        return self._cached_documents(index)[:, 0]

    def _map_documents(self, index: int) -> npt.NDArray[np.uint64]:
        """Return the offsets file of a shard as [documents, 1 or 2].

        Column 0 is the first token of each document within the shard. A corpus with prompts has a column 1: the first
        token after the prompt.
        """
        shard = self.shards[index]
        num_columns = 2 if self.manifest.prompts else 1
        expected_bytes = 8 * num_columns * shard.documents
        path = fetch_offsets(self.directory, shard, expected_bytes, self.cache)
        self._require_file_size(path, expected_bytes, f"{num_columns * shard.documents} offsets of uint64")
        # Mapped, because a run reads the offsets of few documents of a large shard.
        with convert_read_errors(path):
            offsets = np.memmap(path, "<u8", "r") if expected_bytes else np.empty(0, "<u8")
        return offsets.reshape(-1, num_columns)

    def read_document_starts(self, index: int, first_document: int, end_document: int) -> Ints:
        """Return the first tokens of documents [first_document, end_document) of shard `index`.

        Raises DataError unless these positions ascend within the shard.
        """
        starts = self.get_document_offsets(index)[first_document:end_document].astype(np.int64)
        if len(starts) and (starts[0] < 0 or starts[-1] >= self.shards[index].tokens or (np.diff(starts) <= 0).any()):
            self._raise_bad_offsets(index)
        return starts

    def compute_loss_weights(
        self, starts: Ints, window_tokens: int, prompt_loss_weight: float
    ) -> npt.NDArray[np.float64]:
        """Return [len(starts), window_tokens]: `prompt_loss_weight` for the tokens of prompts, 1 for all others."""
        weights = np.ones((len(starts), window_tokens))
        for row, start in zip(weights, starts.tolist(), strict=True):
            for document in self.iter_documents(start, window_tokens):
                row[max(document.start - start, 0) : max(document.completion - start, 0)] = prompt_loss_weight
        return weights

    def compute_document_ids(self, starts: Ints, window_tokens: int) -> Ints:
        """Return [len(starts), window_tokens]: the document of each token, counted from 0 within its window."""
        is_document_start = np.zeros((len(starts), window_tokens), np.int64)
        for row, start in zip(is_document_start, starts.tolist(), strict=True):
            for shard in self._find_shards(start, window_tokens):
                shard_position = self.get_shard_start(shard) - start  # within the window
                offsets = self.get_document_offsets(shard)
                # Documents that start in the window, except at its first token: that document has id 0 anyway.
                # The search keys need the dtype of the offsets. Otherwise searchsorted converts the whole file.
                bounds = np.array([max(1 - shard_position, 0), max(window_tokens - shard_position, 0)], np.uint64)
                first_document, end_document = np.searchsorted(offsets, bounds).tolist()
                starts_in_window = self.read_document_starts(shard, first_document, end_document) + shard_position
                if len(starts_in_window) and not 0 < starts_in_window[0] <= starts_in_window[-1] < window_tokens:
                    self._raise_bad_offsets(shard)
                row[starts_in_window] = 1
        return np.cumsum(is_document_start, axis=1)

    def _find_shards(self, start: int, num_tokens: int) -> range:
        """Return the indices of the shards that have tokens in [start, start + num_tokens)."""
        first, last = np.searchsorted(self.shard_ends, (start, start + num_tokens - 1), side="right").tolist()
        return range(first, last + 1)

    def check_document_bounds(self) -> None:
        """Raise DataError if the document boundaries of the corpus are unknown."""
        if not self.manifest.has_document_bounds:
            raise DataError(
                f"{self.directory}: document boundaries are unknown: the adopted files have no index and contain no "
                "<|endoftext|>. Set data.document_mask to false and data.windows to stream; or tokenize the text "
                "again with a separator, and adopt or prepare it again"
            )

    def iter_documents(self, start: int, num_tokens: int) -> Iterator[DocumentLocation]:
        """Yield the documents that have tokens in [start, start + num_tokens)."""
        for shard in self._find_shards(start, num_tokens):
            shard_tokens = self.shards[shard].tokens
            shard_start = self.get_shard_start(shard)
            documents = self._cached_documents(shard)
            bounds = (max(start - shard_start, 0), start + num_tokens - 1 - shard_start)
            after_first, end_document = np.searchsorted(documents[:, 0], bounds, "right")
            for index in range(max(int(after_first) - 1, 0), int(end_document)):
                is_last = index + 1 == len(documents)
                document_end = shard_tokens if is_last else int(documents[index + 1, 0])
                document_start, completion = int(documents[index, 0]), int(documents[index, -1])
                if not (document_start <= completion <= document_end and document_start < document_end <= shard_tokens):
                    self._raise_bad_offsets(shard)
                yield DocumentLocation(
                    shard,
                    index,
                    start=shard_start + document_start,
                    end=shard_start + document_end,
                    completion=shard_start + completion,
                )

    def _fetch_shard(self, index: int) -> Path:
        """Fetch shard `index` if it is remote, and return its path.

        Raises DataError if the size of the file differs from the manifest.
        """
        shard = self.shards[index]
        expected_bytes = shard.skip_bytes + shard.tokens * self.dtype.itemsize
        path = fetch_shard(self.directory, shard, expected_bytes, self.cache)
        header = f" after a header of {shard.skip_bytes} bytes" if shard.skip_bytes else ""
        return self._require_file_size(path, expected_bytes, f"{shard.tokens} tokens of {self.manifest.dtype}{header}")

    def _require_file_size(self, path: Path, expected_bytes: int, description: str) -> Path:
        """Return `path`. Raises DataError if the file cannot be read or has another size than expected."""
        with convert_read_errors(path):
            status = path.stat()
            num_bytes = status.st_size
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not os.access(path, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if num_bytes != expected_bytes:
            problem = "truncated" if num_bytes < expected_bytes else "too long"
            raise DataError(
                f"{path}: {problem} at byte {min(num_bytes, expected_bytes)}: {num_bytes} bytes, but the manifest says "
                f"{expected_bytes} ({description}). Copy it again or prepare the corpus again."
            )
        return path

    def check_shard_sizes(self) -> None:
        """Check the sizes of all local shards, so that a truncated shard fails at the start of a run."""
        local_shards = [index for index in range(len(self.shards)) if index not in self._remote_shards]
        # In parallel, because a stat call on a network file system takes a millisecond or more.
        with ThreadPoolExecutor(NUM_STAT_THREADS) as pool:
            for _ in pool.map(self._fetch_shard, local_shards):
                pass

    def _verify_hash(self, index: int) -> None:
        """Raise DataError if the SHA-256 of shard `index` differs from the manifest."""
        path = self._fetch_shard(index)
        with convert_read_errors(path), path.open("rb") as file:
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

    def _raise_bad_token_id(self, windows: Tokens, starts: Ints) -> NoReturn:
        """Raise the error for the first id of `windows` that the tokenizer lacks."""
        row, column = np.argwhere(windows >= self.manifest.vocab_size)[0].tolist()
        position = int(starts[row]) + column
        index = int(np.searchsorted(self.shard_ends, position, side="right"))
        shard = self.shards[index]
        position_in_shard = position - self.get_shard_start(index)
        byte_offset = shard.skip_bytes + position_in_shard * self.dtype.itemsize
        raise DataError(
            f"{self._fetch_shard(index)}: token {position_in_shard} (byte {byte_offset}) is "
            f"{windows[row, column]}, but the tokenizer has {self.manifest.vocab_size} ids. "
            "The shard is damaged or of another tokenizer: prepare the corpus again."
        )
