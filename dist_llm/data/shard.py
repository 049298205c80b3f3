"""The format of prepared text: token shards and the manifest that vouches for them.

A corpus is a directory:

    manifest.json            written last; without it the directory is not a corpus
    tokenizer.json           see dist_llm/text/tokenizer.py
    train-00000.bin          token ids, little-endian uint16 or uint32, no header
    train-00000.offsets      little-endian uint64: the first token of each document, within its shard; of a corpus
                             with prompts followed by the first token after the document's prompt
    heldout-00000.bin ...

Documents end with `<|endoftext|>` and never straddle two shards. The offsets alone decide where a document begins:
in adopted files a separator may begin a document, or there may be none.

`dist-llm adopt` writes such a directory for token files of other programs, which stay where they are: a shard's
`file` is then an absolute path or a URL, `skip_bytes` leads past its header, and `offsets` names the file of its
documents, which in a file cut by others may straddle two shards.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from dist_llm.data.growing import FileState, GrowingFile, check_prefix
from dist_llm.errors import DataError

Split = Literal["train", "heldout"]
DType = Literal["uint16", "uint32"]
MAX_COUNT = 1 << 48  # of tokens or bytes of a file; sums of many still fit into 64 bits
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
SPLITS: tuple[Split, ...] = ("train", "heldout")
MANIFEST = "manifest.json"
FORMAT = "dist_llm token shards 1"
ADOPTED = "adopted from "  # how the source of an adopted corpus begins
STRICT_CONFIG = ConfigDict(strict=True, extra="forbid")  # how a manifest is read: no other fields, no other types


def smallest_dtype(vocab_size: int) -> DType:
    """The narrowest id type that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class Shard:
    """One file of token ids; `file` and `offsets` are URLs, or paths relative to the corpus directory."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_CONFIG

    file: str
    tokens: Count
    documents: Count
    text_bytes: Count
    sha256: str  # of the whole file, what is skipped included
    skip_bytes: Count = 0  # before the first id
    offsets: str = ""  # empty: as `file`, with the suffix .offsets

    @property
    def offsets_file(self) -> str:
        return self.offsets or os.path.splitext(self.file)[0] + ".offsets"


@dataclass(frozen=True)
class Manifest:
    """All that `train` needs to know of a corpus without reading its tokens."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_CONFIG

    dtype: DType
    vocab_size: Count
    tokenizer_sha256: str
    source: tuple[str, ...]
    shards: dict[Split, tuple[Shard, ...]]
    bad_rows: Count = 0
    prompts: bool = False  # whether offsets tell where each document's prompt ends
    document_bounds: bool | None = None  # of adopted files: whether any says where documents begin

    @property
    def has_document_bounds(self) -> bool:
        """Whether documents are known. Manifests of older versions do not say: one document a file means no."""
        if self.document_bounds is not None or not self.source or not self.source[0].startswith(ADOPTED):
            return self.document_bounds is not False
        files = [shard for split in SPLITS for shard in self.shards[split]]
        return "megatron" in self.source[0] or any(shard.documents > 1 for shard in files)

    def tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.shards[split])

    def documents(self, split: Split) -> int:
        return sum(shard.documents for shard in self.shards[split])

    def text_bytes(self, split: Split) -> int:
        """Bytes of UTF-8 text, the separators not counted."""
        return sum(shard.text_bytes for shard in self.shards[split])

    def fingerprint(self) -> str:
        """A hash of the content: equal for equal tokens, whatever the directory is called."""
        content = {split: [shard.sha256 for shard in self.shards[split]] for split in SPLITS}
        return hashlib.sha256(json.dumps([self.tokenizer_sha256, content]).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write the manifest durably: it is the mark that the directory is complete."""
        temporary = directory / (MANIFEST + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, **asdict(self)}, file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(directory / MANIFEST)

    @staticmethod
    def load(directory: Path) -> "Manifest":
        """Read it back. Raises DataError where `directory` is no complete corpus."""
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
        """What `save` wrote, from its bytes. Raises DataError, naming `place`, where they are no manifest."""
        try:
            fields = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{origin}: cannot be read as JSON: {error}. Prepare the corpus again.") from None
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise DataError(f"{origin}: not of format '{FORMAT}'. Prepare the corpus again with this version.")
        try:
            manifest = TypeAdapter(Manifest).validate_json(json.dumps(fields))  # as JSON: there a list is a tuple
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
                        "`dist-llm adopt` wrote points elsewhere."
                    )
        return manifest

    def allows_path(self, file: str) -> bool:
        """Whether a shard may lie there: in the corpus, at a URL, or of adopted files at an absolute path."""
        if "\0" in file:
            return False
        if file.startswith(("/", "file://")):
            return self.source[:1] != () and self.source[0].startswith(ADOPTED)
        return "://" in file or (file != "" and ".." not in file.split("/"))


@dataclass(frozen=True)
class ShardState:
    """A shard so far, and what its two files must hold for it to be taken up again."""

    shard: Shard
    ids: FileState
    offsets: FileState


class ShardWriter:
    """Writes the documents of one split in order, a new shard whenever one is full.

    Peak memory is what one call adds: ids go to the file as they come, the hash is kept as they pass.
    `close` makes the shards whole and durable; the end of a `with` only lets go of what an error left open.
    """

    def __init__(self, directory: Path, split: Split, dtype: DType, max_tokens: int, prompts: bool = False) -> None:
        self.directory, self.split, self.max_tokens, self.prompts = directory, split, max_tokens, prompts
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shards: list[Shard] = []
        self._open: list[GrowingFile] = []  # ids and offsets of the shard being written
        self._unreported: list[ShardState] = []  # shards finished since the last sync

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
        """Append documents that follow one another in `ids`: number k ends before `ends[k]`, after a prompt of
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
            last = max(last, first + 1)  # a document longer than a shard gets one of its own
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
        """Make durable what was added. Returns the shards that changed since the last sync, in order."""
        for file in self._open:
            file.sync()
        changed = [*self._unreported, *([self._state()] if self._open else [])]
        self._unreported = []
        return changed

    def restore(self, states: list[ShardState]) -> None:
        """Go on after `states`, the newest of each shard. Raises DataError where a file is not as it was."""
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
        """The files of all shards so far, that being written included."""
        ids = [self.directory / shard.file for shard in self.shards]
        finished = [path for path in ids for file in (path, path.with_suffix(".offsets"))]
        return finished + [file.path for file in self._open]

    def close(self) -> tuple[Shard, ...]:
        """Finish the last shard and return them all."""
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
