"""The format of a corpus: token shards, and a manifest with their sizes and hashes.

A corpus is a directory:

    manifest.json            written last; a directory without it is not a corpus
    tokenizer.json           see dist_llm/text/tokenizer.py
    train-00000.bin          token ids, little-endian uint16 or uint32, no header
    train-00000.offsets      little-endian uint64: the first token of each document, counted from the start of its
                             shard; in a corpus with prompts, each is followed by the first token after the prompt
    heldout-00000.bin ...

`dist-llm prepare` writes documents that end with `<|endoftext|>` and do not cross shards. `dist-llm adopt` writes a
manifest for the token files of other programs. Then the `file` of a shard is an absolute path or a URL, `skip_bytes` is
the size of its header, and `offsets` names its offsets file; a document may cross shards, and `<|endoftext|>` may begin
documents or be absent. So readers find documents by the offsets only.
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
from dist_llm.io.resumable_file import FileState, ResumableFile, hash_prefix

Split = Literal["train", "heldout"]
DType = Literal["uint16", "uint32"]
MAX_COUNT = 1 << 48  # maximum number of tokens or bytes of a file, so that sums over files fit in 64 bits
Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
SPLITS: tuple[Split, ...] = ("train", "heldout")
MANIFEST_FILE = "manifest.json"
FORMAT = "dist_llm token shards 1"
ADOPTED = "adopted from "  # `source` of an adopted corpus begins with this
STRICT_CONFIG = ConfigDict(strict=True, extra="forbid")  # for reading a manifest: no unknown fields, no type conversion


def select_token_dtype(vocab_size: int) -> DType:
    """Return the narrowest dtype for the ids below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class Shard:
    """The manifest entry of one file of token ids. `file` and `offsets` are URLs, or relative to the corpus directory.

    The fields are keys of the manifest.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_CONFIG

    file: str
    tokens: Count
    documents: Count
    text_bytes: Count
    sha256: str  # hash of the file, including the header
    skip_bytes: Count = 0  # header bytes before the first id
    offsets: str = ""  # empty: `file` with the suffix .offsets

    @property
    def offsets_file(self) -> str:
        return self.offsets or os.path.splitext(self.file)[0] + ".offsets"


@dataclass(frozen=True)
class CorpusManifest:
    """The content of manifest.json: what training needs to know about a corpus before it reads tokens."""

    __pydantic_config__: ClassVar[ConfigDict] = STRICT_CONFIG

    dtype: DType
    vocab_size: Count
    tokenizer_sha256: str
    source: tuple[str, ...]
    shards: dict[Split, tuple[Shard, ...]]
    bad_rows: Count = 0
    prompts: bool = False  # whether the offsets files have the end of the prompt of each document
    document_bounds: bool | None = None  # in an adopted corpus: whether document boundaries are known

    @property
    def has_document_bounds(self) -> bool:
        """Whether document boundaries are known.

        Manifests of older versions do not say so. There, boundaries are unknown if each file is a single document.
        """
        if self.document_bounds is not None or not self.source or not self.source[0].startswith(ADOPTED):
            return self.document_bounds is not False
        files = [shard for split in SPLITS for shard in self.shards[split]]
        return "megatron" in self.source[0] or any(shard.documents > 1 for shard in files)

    def count_tokens(self, split: Split) -> int:
        return sum(shard.tokens for shard in self.shards[split])

    def count_documents(self, split: Split) -> int:
        return sum(shard.documents for shard in self.shards[split])

    def count_text_bytes(self, split: Split) -> int:
        """Return the number of bytes of UTF-8 text, without `<|endoftext|>`."""
        return sum(shard.text_bytes for shard in self.shards[split])

    def compute_fingerprint(self) -> str:
        """Return a hash of the tokenizer and the tokens. It does not depend on the paths of the files."""
        content = {split: [shard.sha256 for shard in self.shards[split]] for split in SPLITS}
        return hashlib.sha256(json.dumps([self.tokenizer_sha256, content]).encode()).hexdigest()

    def save(self, directory: Path) -> None:
        """Write the manifest and sync it. A directory with a manifest is a complete corpus."""
        content = json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n"
        replace_file(directory / MANIFEST_FILE, content.encode())

    @staticmethod
    def load(directory: Path) -> "CorpusManifest":
        """Read the manifest. Raises DataError if `directory` is not a complete corpus."""
        path = directory / MANIFEST_FILE
        try:
            return CorpusManifest.parse(path.read_bytes(), str(path))
        except FileNotFoundError:
            raise DataError(
                f"{directory}: not a prepared corpus ({MANIFEST_FILE} is missing). Make one with: "
                f"dist-llm prepare --source SOURCE --tokenizer bpe:4096 --out {directory}"
            ) from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}. Prepare the corpus again.") from None

    @staticmethod
    def parse(content: bytes, origin: str) -> "CorpusManifest":
        """Parse the content of a manifest. Raises DataError, which names `origin`, if it is invalid."""
        try:
            fields = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{origin}: cannot be read as JSON: {error}. Prepare the corpus again.") from None
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise DataError(f"{origin}: not of format '{FORMAT}'. Prepare the corpus again with this version.")
        try:
            # Validate JSON instead of `fields`: in strict mode only JSON input may give a list for a tuple.
            manifest = TypeAdapter(CorpusManifest).validate_json(json.dumps(fields))
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"]))
            raise DataError(f"{origin}: {field}: {problem['msg']}. Prepare the corpus again.") from None
        if missing := [split for split in SPLITS if split not in manifest.shards]:
            raise DataError(f"{origin}: shards: {missing[0]} is missing. Prepare the corpus again.")
        for shard in (shard for split in SPLITS for shard in manifest.shards[split]):
            for file in (shard.file, shard.offsets_file):
                if not manifest.allows_path(file):
                    raise DataError(
                        f"{origin}: names a file outside the corpus: {file!r}. Prepare the corpus again; only the "
                        "manifest of an adopted corpus may name files elsewhere."
                    )
        return manifest

    def allows_path(self, file: str) -> bool:
        """Return whether a shard may name this file: in the corpus, at a URL or, if adopted, at an absolute path."""
        if "\0" in file:
            return False
        if file.startswith(("/", "file://")):
            return self.source[:1] != () and self.source[0].startswith(ADOPTED)
        return "://" in file or (file != "" and ".." not in file.split("/"))


@dataclass(frozen=True)
class ShardState:
    """A shard (finished or not) and the states of its two files, from which `ShardWriter` can resume."""

    shard: Shard
    ids: FileState
    offsets: FileState


class ShardWriter:
    """Writes the documents of one split in order. It starts a new shard when one is full.

    Ids are written and hashed immediately, so nothing is buffered between calls. `close` finishes the shards and syncs
    them. The end of a `with` block only closes the files that an error left open.
    """

    def __init__(self, directory: Path, split: Split, dtype: DType, max_tokens: int, has_prompts: bool = False) -> None:
        self.directory, self.split, self.max_tokens, self.has_prompts = directory, split, max_tokens, has_prompts
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.shards: list[Shard] = []
        self._open_files: list[ResumableFile] = []  # ids and offsets of the current shard
        self._unreported: list[ShardState] = []  # shards finished since the last sync

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *raised: object) -> None:
        for file in self._open_files:
            file.abandon()

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append one document. `ids` includes its end-of-document token."""
        self.extend(ids, np.array([len(ids)]), np.array([text_bytes]))

    def extend(
        self, ids: np.ndarray, ends: np.ndarray, text_bytes: np.ndarray, prompt_tokens: np.ndarray | None = None
    ) -> None:
        """Append consecutive documents, whose tokens are concatenated in `ids`.

        The other arrays have one element per document: the index in `ids` after its last token, the bytes of its text,
        and the number of tokens of its prompt.
        """
        ids = ids.astype(self.dtype, copy=False)
        starts = np.concatenate([[0], ends[:-1]])
        first_document = 0
        while first_document < len(ends):
            if not self._open_files:
                self._start_shard()
            start = int(starts[first_document])
            max_end = start + self.max_tokens - self._num_tokens
            end_document = int(np.searchsorted(ends, max_end, side="right"))
            if end_document <= first_document and self._num_tokens:
                self._finish_shard()
                continue
            end_document = max(end_document, first_document + 1)  # a document longer than a shard gets its own shard
            end = int(ends[end_document - 1])
            self._open_files[0].write(ids[start:end].tobytes())
            offsets = starts[first_document:end_document] - start + self._num_tokens
            if self.has_prompts:
                assert prompt_tokens is not None
                offsets = np.stack((offsets, offsets + prompt_tokens[first_document:end_document]), axis=1)
            self._open_files[1].write(offsets.astype("<u8").tobytes())
            self._num_tokens += end - start
            self._num_documents += end_document - first_document
            self._text_bytes += int(text_bytes[first_document:end_document].sum())
            first_document = end_document

    def sync(self) -> list[ShardState]:
        """Sync all appended documents to the disk. Return the states of the shards that changed since the last sync."""
        for file in self._open_files:
            file.sync()
        changed = [*self._unreported, *([self._get_state()] if self._open_files else [])]
        self._unreported = []
        return changed

    def restore(self, states: list[ShardState]) -> None:
        """Continue after `states`, which has the latest state of each shard. Raises DataError if a file has changed."""
        for state in states[:-1]:
            hash_prefix(self.directory / state.shard.file, state.ids)
            hash_prefix((self.directory / state.shard.file).with_suffix(".offsets"), state.offsets)
            self.shards.append(state.shard)
        for state in states[-1:]:
            path = self.directory / state.shard.file
            self._open_files.append(ResumableFile.reopen(path, state.ids))
            self._open_files.append(ResumableFile.reopen(path.with_suffix(".offsets"), state.offsets))
            self._file = state.shard.file
            self._num_tokens, self._num_documents = state.shard.tokens, state.shard.documents
            self._text_bytes = state.shard.text_bytes

    def list_files(self) -> list[Path]:
        """Return the files of all shards, including the current one."""
        ids = [self.directory / shard.file for shard in self.shards]
        finished_files = [file for path in ids for file in (path, path.with_suffix(".offsets"))]
        return finished_files + [file.path for file in self._open_files]

    def close(self) -> tuple[Shard, ...]:
        """Finish the last shard and return all shards."""
        self._finish_shard()
        return tuple(self.shards)

    def _start_shard(self) -> None:
        self._file = f"{self.split}-{len(self.shards):05d}.bin"
        path = self.directory / self._file
        for file in (path, path.with_suffix(".offsets")):
            self._open_files.append(ResumableFile(file))
        self._num_tokens = self._num_documents = self._text_bytes = 0

    def _finish_shard(self) -> None:
        if not self._open_files:
            return
        for file in self._open_files:
            file.close()
        state = self._get_state()
        self.shards.append(state.shard)
        self._unreported.append(state)
        self._open_files = []

    def _get_state(self) -> ShardState:
        ids, offsets = (file.state for file in self._open_files)
        return ShardState(
            Shard(self._file, self._num_tokens, self._num_documents, self._text_bytes, ids.sha256), ids, offsets
        )
