"""The corpus while it is written: its shards, the duplicates left out, the counts; noted durably at each mark."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dist_llm.data.growing import FileState, GrowingFile
from dist_llm.data.shard import SPLITS, DType, Shard, ShardState, ShardWriter, Split
from dist_llm.text.duplicates import KEY_BYTES, Index, make_index
from dist_llm.text.encode import EncodedChunk
from dist_llm.text.report import Removals, Removed

KEYS = "keys.bin"
KEYS_AT_ONCE = 1 << 12


class Assembly:
    """Takes encoded chunks in order. Used as a context: what an error leaves open is let go of."""

    def __init__(
        self,
        directory: Path,
        dtype: DType,
        shard_tokens: int,
        dedup: str | None,
        threshold: float,
        removed: Removals,
        prompts: bool = False,
    ) -> None:
        self.directory, self.dedup, self.removed = directory, dedup, removed
        self.kept = Removed()
        self._writers = {split: ShardWriter(directory, split, dtype, shard_tokens, prompts) for split in SPLITS}
        self._index: Index | None = make_index(dedup, threshold) if dedup else None
        self._keys: GrowingFile | None = None

    def __enter__(self) -> "Assembly":
        return self

    def __exit__(self, *raised: object) -> None:
        for writer in self._writers.values():
            writer.__exit__(*raised)
        if self._keys:
            self._keys.abandon()

    def add(self, chunk: EncodedChunk) -> None:
        """Append the documents that are no duplicates to their splits."""
        self.removed.merge(chunk.removed)
        new = self._new(chunk)
        lengths = np.diff(chunk.ends, prepend=0)
        for split in SPLITS:
            chosen = new & (chunk.heldout == (split == "heldout"))
            ids = chunk.ids if chosen.all() else chunk.ids[np.repeat(chosen, lengths)]
            self._writers[split].extend(
                ids, np.cumsum(lengths[chosen]), chunk.text_bytes[chosen], chunk.prompts[chosen]
            )
        self.kept.documents += int(new.sum())
        self.kept.bytes += int(chunk.text_bytes[new].sum())

    def _new(self, chunk: EncodedChunk) -> npt.NDArray[np.bool_]:
        """Which documents are no duplicates."""
        if self._index is None:
            return np.ones(len(chunk.ends), dtype=np.bool_)
        new = np.array([self._index.is_new(key) for key in chunk.keys], dtype=np.bool_)
        self._keys_file().write(chunk.keys[new].tobytes())
        self.removed.add(f"dedup.{self.dedup}", int((~new).sum()), 0, int(chunk.text_bytes[~new].sum()))
        return new

    def _keys_file(self) -> GrowingFile:
        if self._keys is None:
            self._keys = GrowingFile(self.directory / KEYS)
        return self._keys

    def note(self) -> dict[str, Any]:
        """Make durable what was added, and say what a run that goes on has to know; shards since the last note."""
        return {
            "shards": {split: [asdict(state) for state in writer.sync()] for split, writer in self._writers.items()},
            "keys": asdict(self._keys_file().sync()) if self._index else None,
            "kept": asdict(self.kept),
            "removed": {rule: asdict(removed) for rule, removed in self.removed.items()},
        }

    def restore(self, notes: Sequence[dict[str, Any]]) -> None:
        """Go on after these notes. Raises DataError where a file is no longer as it was."""
        for split, writer in self._writers.items():
            newest = {state["shard"]["file"]: state for note in notes for state in note["shards"][split]}
            writer.restore([_shard_state(state) for state in newest.values()])
        if self._index:
            self._keys = GrowingFile.reopen(self.directory / KEYS, FileState(**notes[-1]["keys"]))
            self._remember(self._index)
        self.kept = Removed(**notes[-1]["kept"])
        self.removed = Removals({rule: Removed(**counts) for rule, counts in notes[-1]["removed"].items()})

    def _remember(self, index: Index) -> None:
        width = KEY_BYTES[str(self.dedup)]
        with (self.directory / KEYS).open("rb") as file:
            while raw := file.read(width * KEYS_AT_ONCE):
                for key in np.frombuffer(raw, dtype=np.uint8).reshape(-1, width):
                    index.remember(key)

    def clear_others(self, names: set[str]) -> None:
        """Remove all files but these and those it goes on with."""
        known = {file.name for writer in self._writers.values() for file in writer.files()}
        for path in self.directory.iterdir():
            if path.name not in names | known | ({KEYS} if self._keys else set()):
                path.unlink()

    def close(self) -> dict[Split, tuple[Shard, ...]]:
        """Finish the shards and return them."""
        if self._keys:
            self._keys.close()
        return {split: writer.close() for split, writer in self._writers.items()}


def _shard_state(state: dict[str, Any]) -> ShardState:
    return ShardState(Shard(**state["shard"]), FileState(**state["ids"]), FileState(**state["offsets"]))
