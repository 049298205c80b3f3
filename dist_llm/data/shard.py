"""The format of prepared text: token shards and a manifest with their sizes and hashes.

A corpus is a directory:

    manifest.json            written last; a directory without it is not a corpus
    tokenizer.json           see dist_llm/text/tokenizer.py
    train-00000.bin          token ids, little-endian uint16 or uint32, no header
    train-00000.offsets      little-endian uint64: the first token of each document, within its shard; in a corpus
                             with prompts each is followed by the first token after the document's prompt
    heldout-00000.bin ...

Documents end with `<|endoftext|>` and never cross shards. Only the offsets decide where a document begins: in adopted
files a separator may begin a document, or there may be no separators.

`dist-llm adopt` writes such a directory for token files of other programs, which stay in place. A shard's `file` is
then an absolute path or a URL, `skip_bytes` is the size of its header, and `offsets` names its offsets file. In adopted
files a document may cross two shards.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from dist_llm.errors import DataError
from dist_llm.io.atomic import replace_file
from dist_llm.io.growing import FileState, GrowingFile, check_prefix

Split = Literal["train", "heldout"]
DType = Literal["uint16", "uint32"]
MAX_COUNT = 1 << 48  # tokens or bytes of a file; sums of many still fit in 64 bits
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
SPLITS: tuple[Split, ...] = ("train", "heldout")
MANIFEST = "manifest.json"
FORMAT = "dist_llm token shards 1"
ADOPTED = "adopted from "  # prefix of the source of an adopted corpus
STRICT_CONFIG = ConfigDict(strict=True, extra="forbid")  # for reading a manifest: no unknown fields, no type conversion


def smallest_dtype(vocab_size: int) -> DType:
    """Return the narrowest dtype that holds all ids below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class Shard:
    """One file of token ids. `file` and `offsets` are URLs, or paths relative to the corpus directory."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_CONFIG

    file: str
    tokens: Count
    documents: Count
    text_bytes: Count
    sha256: str  # of the whole file, including skipped bytes
    skip_bytes: Count = 0  # header bytes before the first id
    offsets: str = ""  # empty: `file` with the suffix .offsets

    @property
    def offsets_file(self) -> str:
        return self.offsets or os.path.splitext(self.file)[0] + ".offsets"


@dataclass(frozen=True)
class Manifest:
    """Facts about a corpus that `train` needs without reading its tokens."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_CONFIG

    dtype: DType
    vocab_size: Count
    tokenizer_sha256: str
    source: tuple[str, ...]
    shards: dict[Split, tuple[Shard, ...]]
    bad_rows: Count = 0
    prompts: bool = False  # whether the offsets include the end of each document's prompt
    document_bounds: bool | None = None  # adopted files: whether document boundaries are known

    @property
    def has_document_bounds(self) -> bool:
        """Whether document boundaries are known. In manifests of older versions, one document per file means
        that they are not."""
        if self.document_bounds is not None or not self.source or not self.source[0].startswith(ADOPTED):
            return self.document_bounds is not False
        files = [shard for split in SPLITS for shard in self.shards[split]]
        return "megatron" in self.source[0] or any(shard.documents > 1 for shard in files)

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.shards[split])

    def documents(self, split: Split) -> int:
        return sum(shard.documents for shard in self.shards[split])

    def text_bytes(self, split: Split) -> int:
        """Return the bytes of UTF-8 text, without separators."""
        return sum(shard.text_bytes for shard in self.shards[split])

    def fingerprint(self) -> str:
        """Return a hash of the content. It is equal for equal tokens, whatever the directory's name."""
        content = {split: [shard.sha256 for shard in self.shards[split]] for split in SPLITS}
        return hashlib.sha256(json.dumps([self.tokenizer_sha256, content]).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write the manifest durably. It marks the directory as complete."""
        content = json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"
        replace_file(directory / MANIFEST, content.encode())

    @staticmethod
    def load(directory: Path) -> "Manifest":
        """Read the manifest. Raises DataError if `directory` is not a complete corpus."""
        path = directory / MANIFEST
        try:
            return Manifest.parse(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise DataError(
                f"{directory}: not a prepared corpus ({MANIFEST} is missing). Make one with: "
                f"dist-llm prepare --source SOURCE --tokenizer bpe:4096 --out {directory}"
            ) from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}. Prepare the corpus again.") from None

    @staticmethod
    def parse(content: bytes, origin: str) -> "Manifest":
        """Read the bytes of a manifest. Raises DataError, naming `origin`, if they are invalid."""
        try:
            fields = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{origin}: cannot be read as JSON: {error}. Prepare the corpus again.") from None
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise DataError(f"{origin}: not of format '{FORMAT}'. Prepare the corpus again with this version.")
        try:
            # as JSON, where a list is valid for a tuple
            manifest = TypeAdapter(Manifest).validate_json(json.dumps(fields))
        except ValidationError as error:
            first = error.errors()[0]
            wrong = ".".join(map(str, first["loc"]))
            raise DataError(f"{origin}: {wrong}: {first['msg']}. Prepare the corpus again.") from None
        if missing := [split for split in SPLITS if split not in manifest.shards]:
            raise DataError(f"{origin}: shards: {missing[0]} is missing. Prepare the corpus again.")
        for shard in (shard for split in SPLITS for shard in manifest.shards[split]):
            for file in (shard.file, shard.offsets_file):
                if not manifest.allows_path(file):
                    raise DataError(
                        f"{origin}: names a file outside the corpus: {file!r}. Prepare the corpus again; only what "
                        "`dist-llm adopt` writes may name files elsewhere."
                    )
        return manifest

    def allows_path(self, file: str) -> bool:
        """Return whether a shard may have this file: in the corpus, at a URL or, if adopted, at an absolute path."""
        if "\0" in file:
            return False
        if file.startswith(("/", "file://")):
            return self.source[:1] != () and self.source[0].startswith(ADOPTED)
        return "://" in file or (file != "" and ".." not in file.split("/"))


@dataclass(frozen=True)
class ShardState:
    """An unfinished or finished shard and the states of its two files, to resume from."""

    shard: Shard
    ids: FileState
    offsets: FileState


class ShardWriter:
    """Writes the documents of one split in order. It starts a new shard when one is full.

    Peak memory is the size of one call's documents: ids are written and hashed as they come. `close` makes the shards
    complete and durable. Leaving a `with` block only closes the files that an error left open.
    """

    def __init__(self, directory: Path, split: Split, dtype: DType, max_tokens: int, prompts: bool = False) -> None:
        self.directory, self.split, self.max_tokens, self.prompts = directory, split, max_tokens, prompts
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shards: list[Shard] = []
        self._open: list[GrowingFile] = []  # ids and offsets of the current shard
        self._unreported: list[ShardState] = []  # finished since the last sync

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *raised: object) -> None:
        for file in self._open:
            file.abandon()

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append one document; `ids` ends with the separator."""
        self.extend(ids, np.array([len(ids)]), np.array([text_bytes]))

    def extend(
        self, ids: np.ndarray, ends: np.ndarray, text_bytes: np.ndarray, prompts: np.ndarray | None = None
    ) -> None:
        """Append consecutive documents of `ids`. Document k ends before `ends[k]` and begins with a prompt of
        `prompts[k]` tokens."""
        ids = ids.astype(self.dtype, copy=False)
        starts = np.concatenate([[0], ends[:-1]])
        first = 0
        while first < len(ends):
            if not self._open:
                self._start_shard()
            begin = int(starts[first])
            last = int(np.searchsorted(ends, begin + self.max_tokens - self._tokens, side="right"))
            if last <= first and self._tokens:
                self._finish_shard()
                continue
            last = max(last, first + 1)  # a document longer than a shard gets its own shard
            end = int(ends[last - 1])
            self._open[0].write(ids[begin:end].tobytes())
            offsets = starts[first:last] - begin + self._tokens
            if self.prompts:
                assert prompts is not None
                offsets = np.stack((offsets, offsets + prompts[first:last]), axis=1)
            self._open[1].write(offsets.astype("<u8").tobytes())
            self._tokens += end - begin
            self._documents += last - first
            self._text_bytes += int(text_bytes[first:last].sum())
            first = last

    def sync(self) -> list[ShardState]:
        """Make all appended documents durable. Returns the states of the shards changed since the last sync, in
        order."""
        for file in self._open:
            file.sync()
        changed = [*self._unreported, *([self._state()] if self._open else [])]
        self._unreported = []
        return changed

    def restore(self, states: list[ShardState]) -> None:
        """Continue after `states`, the latest of each shard. Raises DataError if a file has changed."""
        for state in states[:-1]:
            check_prefix(self.directory / state.shard.file, state.ids)
            check_prefix((self.directory / state.shard.file).with_suffix(".offsets"), state.offsets)
            self.shards.append(state.shard)
        for state in states[-1:]:
            path = self.directory / state.shard.file
            self._open.append(GrowingFile.reopen(path, state.ids))
            self._open.append(GrowingFile.reopen(path.with_suffix(".offsets"), state.offsets))
            self._file = state.shard.file
            self._tokens, self._documents = state.shard.tokens, state.shard.documents
            self._text_bytes = state.shard.text_bytes

    def files(self) -> list[Path]:
        """Return the files of all shards, including the current one."""
        ids = [self.directory / shard.file for shard in self.shards]
        finished = [file for path in ids for file in (path, path.with_suffix(".offsets"))]
        return finished + [file.path for file in self._open]

    def close(self) -> tuple[Shard, ...]:
        """Finish the last shard and return all shards."""
        self._finish_shard()
        return tuple(self.shards)

    def _start_shard(self) -> None:
        self._file = f"{self.split}-{len(self.shards):05d}.bin"
        path = self.directory / self._file
        for file in (path, path.with_suffix(".offsets")):
            self._open.append(GrowingFile(file))
        self._tokens = self._documents = self._text_bytes = 0

    def _finish_shard(self) -> None:
        if not self._open:
            return
        for file in self._open:
            file.close()
        state = self._state()
        self.shards.append(state.shard)
        self._unreported.append(state)
        self._open = []

    def _state(self) -> ShardState:
        ids, offsets = (file.state for file in self._open)
        return ShardState(Shard(self._file, self._tokens, self._documents, self._text_bytes, ids.sha256), ids, offsets)
