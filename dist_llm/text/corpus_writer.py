"""Write encoded chunks to the shards of a corpus: drop duplicates, count documents, sync at each resume point."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_llm.data.shard import SPLITS, DType, Shard, ShardState, ShardWriter, Split
from dist_llm.io.resumable_file import FileState, ResumableFile
from dist_llm.text.duplicates import KEY_BYTES, DuplicateIndex, build_index
from dist_llm.text.encode import EncodedChunk
from dist_llm.text.report import RemovalCounts, TextCount

KEYS_FILE = "keys.bin"  # the deduplication keys of all written documents, to restore the index of a resumed run
KEYS_PER_READ = 1 << 12  # keys that a resumed run reads at once


class CorpusWriter:
    """Appends encoded chunks in order. As a context manager it closes the open files after an error."""

    def __init__(
        self,
        directory: Path,
        dtype: DType,
        shard_tokens: int,
        dedup: str | None,
        threshold: float,
        removed: RemovalCounts,
        has_prompts: bool = False,
    ) -> None:
        self.directory, self.dedup, self.removal_counts = directory, dedup, removed
        self.written_counts = TextCount()
        self._writers = {split: ShardWriter(directory, split, dtype, shard_tokens, has_prompts) for split in SPLITS}
        self._index: DuplicateIndex | None = build_index(dedup, threshold) if dedup else None
        self._keys_file: ResumableFile | None = None

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, *raised: object) -> None:
        for writer in self._writers.values():
            writer.__exit__(*raised)
        if self._keys_file:
            self._keys_file.abandon()

    def add(self, chunk: EncodedChunk) -> None:
        """Append the documents that are not duplicates to their splits."""
        self.removal_counts.merge(chunk.removed)
        is_new = self._find_new_documents(chunk)
        document_tokens = np.diff(chunk.ends, prepend=0)
        for split in SPLITS:
            is_selected = is_new & (chunk.is_heldout == (split == "heldout"))
            ids = chunk.ids if is_selected.all() else chunk.ids[np.repeat(is_selected, document_tokens)]
            self._writers[split].extend(
                ids,
                np.cumsum(document_tokens[is_selected]),
                chunk.text_bytes[is_selected],
                chunk.prompt_tokens[is_selected],
            )
        self.written_counts.documents += int(is_new.sum())
        self.written_counts.bytes += int(chunk.text_bytes[is_new].sum())

    def _find_new_documents(self, chunk: EncodedChunk) -> npt.NDArray[np.bool_]:
        """Return a mask of the documents that are not duplicates. Count the duplicates as removed."""
        if self._index is None:
            return np.ones(len(chunk.ends), dtype=np.bool_)
        is_new = np.array([self._index.add_if_new(key) for key in chunk.keys], dtype=np.bool_)
        self._open_keys_file().write(chunk.keys[is_new].tobytes())
        duplicate_bytes = int(chunk.text_bytes[~is_new].sum())
        self.removal_counts.add(f"dedup.{self.dedup}", documents=int((~is_new).sum()), bytes=duplicate_bytes)
        return is_new

    def _open_keys_file(self) -> ResumableFile:
        if self._keys_file is None:
            self._keys_file = ResumableFile(self.directory / KEYS_FILE)
        return self._keys_file

    def sync(self) -> dict[str, Any]:
        """Sync all files to the disk. Return the state for `restore`, with the shards written since the last sync."""
        return {
            "shards": {split: [asdict(state) for state in writer.sync()] for split, writer in self._writers.items()},
            "keys": asdict(self._open_keys_file().sync()) if self._index else None,
            "kept": asdict(self.written_counts),
            "removed": {rule: asdict(removed) for rule, removed in self.removal_counts.items()},
        }

    def restore(self, sync_states: Sequence[dict[str, Any]]) -> None:
        """Continue after the states that `sync` returned. Raises DataError if a file has changed since."""
        last_state = sync_states[-1]
        for split, writer in self._writers.items():
            latest = {shard["shard"]["file"]: shard for state in sync_states for shard in state["shards"][split]}
            writer.restore([_parse_shard_state(shard) for shard in latest.values()])
        if self._index:
            self._keys_file = ResumableFile.reopen(self.directory / KEYS_FILE, FileState(**last_state["keys"]))
            self._load_keys(self._index)
        self.written_counts = TextCount(**last_state["kept"])
        self.removal_counts = RemovalCounts(
            {rule: TextCount(**counts) for rule, counts in last_state["removed"].items()}
        )

    def _load_keys(self, index: DuplicateIndex) -> None:
        """Add the keys of all documents that an interrupted run has written."""
        key_bytes = KEY_BYTES[str(self.dedup)]
        with (self.directory / KEYS_FILE).open("rb") as file:
            while raw := file.read(key_bytes * KEYS_PER_READ):
                for key in np.frombuffer(raw, dtype=np.uint8).reshape(-1, key_bytes):
                    index.add(key)

    def remove_other_files(self, names: set[str]) -> None:
        """Remove all files of the directory except `names` and the files of this writer."""
        own_names = {file.name for writer in self._writers.values() for file in writer.list_files()}
        if self._keys_file:
            own_names.add(KEYS_FILE)
        for path in self.directory.iterdir():
            if path.name not in names | own_names:
                path.unlink()

    def close(self) -> dict[Split, tuple[Shard, ...]]:
        """Finish the shards and return their manifest entries."""
        if self._keys_file:
            self._keys_file.close()
        return {split: writer.close() for split, writer in self._writers.items()}


def _parse_shard_state(state: dict[str, Any]) -> ShardState:
    return ShardState(Shard(**state["shard"]), FileState(**state["ids"]), FileState(**state["offsets"]))
