"""Read the tensors of a checkpoint one at a time, in a single process."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder, FolderReader
from dist_llm.checkpoint.checkpoint_write import ignore_no_group_warning
from dist_llm.checkpoint.metadata import convert_read_errors
from dist_llm.errors import CheckpointError


class NativeWeights:
    """A checkpoint that was saved in any layout. `shapes` has all its tensors; `read` reads one of them."""

    def __init__(self, path: Path) -> None:
        self.reader = _CachingReader(CheckpointFolder(path))
        self.entries = {
            name: entry
            for name, entry in self.reader.read_metadata().state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.shapes = {name: tuple(entry.size) for name, entry in self.entries.items()}
        self._check_file_sizes()

    def read(self, name: str) -> Tensor:
        state = {name: torch.empty(self.shapes[name], dtype=self.entries[name].properties.dtype)}
        ignore_no_group_warning()
        with convert_read_errors(self.reader.folder):
            state_dict_loader.load(state, storage_reader=self.reader, no_dist=True)
        return state[name]

    def _check_file_sizes(self) -> None:
        """Raise CheckpointError if a file is shorter than the metadata say, since the metadata determine what is
        allocated."""
        folder, ends = self.reader.folder, dict[str, int]()
        for stored in self.reader.read_metadata().storage_data.values():
            ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
        for file, end in ends.items():
            try:
                size = folder.size(file)
            except OSError as error:
                raise CheckpointError(f"{folder}/{file}: cannot be read: {error}") from None
            if size < end:
                raise CheckpointError(f"{folder}/{file}: damaged: has {size} bytes, but its tensors end at byte {end}")


class _CachingReader(FolderReader):
    """Reads the metadata once, instead of once per tensor."""

    @cached_property
    def _metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata
