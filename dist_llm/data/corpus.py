"""One split of a prepared corpus, read as a single stream of tokens that may cross shards."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_llm.data.order import Ints
from dist_llm.data.shard import Manifest, Split
from dist_llm.errors import DataError

Tokens = npt.NDArray[Any]  # of the corpus's own unsigned type


class Corpus:
    """Memory-mapped shards. Nothing is read at start but the manifest; shards open on first use."""

    def __init__(self, directory: Path, split: Split = "train", verify: str = "size") -> None:
        self.directory, self.split = directory, split
        self.manifest = Manifest.load(directory)
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self.shards = self.manifest.shards[split]
        self.ends: Ints = np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)
        self.n_tokens = self.manifest.tokens(split)
        self._maps: dict[int, Tokens] = {}
        if verify == "hash":
            for number in range(len(self.shards)):
                self._verify(number)

    def n_windows(self, window: int, stride: int) -> int:
        """How many windows of `window` tokens fit, each `stride` after the one before."""
        return max(0, (self.n_tokens - window) // stride + 1)

    def read(self, starts: Ints, length: int) -> Tokens:
        """Rows [len(starts), length] of ids, in the corpus's own type.

        Raises DataError, with file and offset, for an id that the tokenizer does not know.
        """
        rows = np.empty((len(starts), length), self.dtype)
        numbers = np.searchsorted(self.ends, starts, side="right")
        for row, start, number in zip(rows, starts.tolist(), numbers.tolist(), strict=True):
            self._fill(row, start, number)
        if rows.size and rows.max() >= self.manifest.vocab_size:
            self._refuse_id(rows, starts)
        return rows

    def _fill(self, row: Tokens, start: int, number: int) -> None:
        filled = 0
        while filled < len(row):
            shard = self._shard(number)
            first = start + filled - (int(self.ends[number]) - len(shard))
            piece = shard[first : first + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            number += 1

    def _shard(self, number: int) -> Tokens:
        if number not in self._maps:
            path, size = self._check_size(number)
            # A plain array over the map: slicing a np.memmap builds a subclass each time.
            self._maps[number] = np.asarray(np.memmap(path, self.dtype, "r", shape=(size,)))
        return self._maps[number]

    def _check_size(self, number: int) -> tuple[Path, int]:
        shard = self.shards[number]
        path = self.directory / shard.file
        want = shard.tokens * self.dtype.itemsize
        try:
            found = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}. Prepare the corpus again.") from None
        if found != want:
            kind = "truncated" if found < want else "too long"
            raise DataError(
                f"{path}: {kind} at byte {min(found, want)}: {found} bytes, but the manifest promises {want} "
                f"({shard.tokens} tokens of {self.manifest.dtype}). Copy it again or prepare the corpus again."
            )
        return path, shard.tokens

    def check_sizes(self) -> None:
        """Stat every shard: a truncated one is found now and not in the middle of a run."""
        for number in range(len(self.shards)):
            self._check_size(number)

    def _verify(self, number: int) -> None:
        path, _ = self._check_size(number)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.shards[number].sha256:
            raise DataError(
                f"{path}: bytes 0 to {path.stat().st_size} have sha256 {found}, but the manifest promises "
                f"{self.shards[number].sha256}. Copy it again or prepare the corpus again."
            )

    def _refuse_id(self, rows: Tokens, starts: Ints) -> None:
        row, column = np.argwhere(rows >= self.manifest.vocab_size)[0].tolist()
        position = int(starts[row]) + column
        number = int(np.searchsorted(self.ends, position, side="right"))
        inside = position - (int(self.ends[number]) - self.shards[number].tokens)
        raise DataError(
            f"{self.directory / self.shards[number].file}: token {inside} (byte {inside * self.dtype.itemsize}) is "
            f"{rows[row, column]}, but the tokenizer has {self.manifest.vocab_size} ids. "
            "The shard is damaged or of another tokenizer: prepare the corpus again."
        )
