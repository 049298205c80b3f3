"""Write the shards of a corpus without duplicates, count documents, and sync the files at each resume point."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_llm.data.shard import SPLITS, DType, Shard, ShardState, ShardWriter, Split
from dist_llm.io.growing import FileState, GrowingFile
from dist_llm.text.duplicates import KEY_BYTES, DuplicateIndex, build_index
from dist_llm.text.encode import EncodedChunk
from dist_llm.text.report import RemovalCounts, TextCount

KEYS_FILE = "keys.bin"
KEYS_PER_READ = 1 << 12


class CorpusWriter:
    """Appends encoded chunks in order. A context manager: on an error it closes the open files."""

    def __init__(
        self,
        directory: Path,
        dtype: DType,
        shard_tokens: int,
        dedup: str | None,
        threshold: float,
        removed: RemovalCounts,
        prompts: bool = False,
    ) -> None:
        self.directory, self.dedup, self.removal_counts = directory, dedup, removed
        self.written_counts = TextCount()
        self._writers = {split: ShardWriter(directory, split, dtype, shard_tokens, prompts) for split in SPLITS}
        self._index: DuplicateIndex | None = build_index(dedup, threshold) if dedup else None
        self._keys: GrowingFile | None = None

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, *raised: object) -> None:
        for writer in self._writers.values():
            writer.__exit__(*raised)
        if self._keys:
            self._keys.abandon()

    def add(self, chunk: EncodedChunk) -> None:
        """Append the documents that are not duplicates to their splits."""
        self.removal_counts.merge(chunk.removed)
        new = self._find_new(chunk)
        lengths = np.diff(chunk.ends, prepend=0)
        for split in SPLITS:
            chosen = new & (chunk.heldout == (split == "heldout"))
            ids = chunk.ids if chosen.all() else chunk.ids[np.repeat(chosen, lengths)]
            self._writers[split].extend(
                ids, np.cumsum(lengths[chosen]), chunk.text_bytes[chosen], chunk.prompts[chosen]
            )
        self.written_counts.documents += int(new.sum())
        self.written_counts.bytes += int(chunk.text_bytes[new].sum())

    def _find_new(self, chunk: EncodedChunk) -> npt.NDArray[np.bool_]:
        """Return a mask of the documents that are not duplicates."""
        if self._index is None:
            return np.ones(len(chunk.ends), dtype=np.bool_)
        new = np.array([self._index.add_if_new(key) for key in chunk.keys], dtype=np.bool_)
        self._keys_file().write(chunk.keys[new].tobytes())
        self.removal_counts.add(f"dedup.{self.dedup}", int((~new).sum()), 0, int(chunk.text_bytes[~new].sum()))
        return new

    def _keys_file(self) -> GrowingFile:
        if self._keys is None:
            self._keys = GrowingFile(self.directory / KEYS_FILE)
        return self._keys

    def sync(self) -> dict[str, Any]:
        """Sync all files to the disk. Return the state for `restore`, with the shards written since the last sync."""
        return {
            "shards": {split: [asdict(state) for state in writer.sync()] for split, writer in self._writers.items()},
            "keys": asdict(self._keys_file().sync()) if self._index else None,
            "kept": asdict(self.written_counts),
            "removed": {rule: asdict(removed) for rule, removed in self.removal_counts.items()},
        }

    def restore(self, notes: Sequence[dict[str, Any]]) -> None:
        """Continue after the states that `sync` returned. Raises DataError if a file has changed since."""
        for split, writer in self._writers.items():
            newest = {state["shard"]["file"]: state for note in notes for state in note["shards"][split]}
            writer.restore([_parse_shard_state(state) for state in newest.values()])
        if self._index:
            self._keys = GrowingFile.reopen(self.directory / KEYS_FILE, FileState(**notes[-1]["keys"]))
            self._load_keys(self._index)
        self.written_counts = TextCount(**notes[-1]["kept"])
        self.removal_counts = RemovalCounts(
            {rule: TextCount(**counts) for rule, counts in notes[-1]["removed"].items()}
        )

    def _load_keys(self, index: DuplicateIndex) -> None:
        width = KEY_BYTES[str(self.dedup)]
        with (self.directory / KEYS_FILE).open("rb") as file:
            while raw := file.read(width * KEYS_PER_READ):
                for key in np.frombuffer(raw, dtype=np.uint8).reshape(-1, width):
                    index.remember(key)

    def remove_other_files(self, names: set[str]) -> None:
        """Remove all files of the directory except `names` and the open files."""
        known = {file.name for writer in self._writers.values() for file in writer.files()}
        for path in self.directory.iterdir():
            if path.name not in names | known | ({KEYS_FILE} if self._keys else set()):
                path.unlink()

    def close(self) -> dict[Split, tuple[Shard, ...]]:
        """Finish the shards and return their manifest entries."""
        if self._keys:
            self._keys.close()
        return {split: writer.close() for split, writer in self._writers.items()}


def _parse_shard_state(state: dict[str, Any]) -> ShardState:
    return ShardState(Shard(**state["shard"]), FileState(**state["ids"]), FileState(**state["offsets"]))
