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
    """The tensors of a checkpoint that was saved in any layout. `shapes` lists all tensors; `read` reads one."""

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
        """Read one full tensor to the CPU."""
        state = {name: torch.empty(self.shapes[name], dtype=self.entries[name].properties.dtype)}
        ignore_no_group_warning()
        with convert_read_errors(self.reader.folder):
            state_dict_loader.load(state, storage_reader=self.reader, no_dist=True)
        return state[name]

    def _check_file_sizes(self) -> None:
        """Raise CheckpointError if a file is shorter than in the metadata, which determine how much is allocated."""
        folder, end_by_file = self.reader.folder, dict[str, int]()
        for stored in self.reader.read_metadata().storage_data.values():
            file, end = stored.relative_path, stored.offset + stored.length
            end_by_file[file] = max(end_by_file.get(file, 0), end)
        for file, end in end_by_file.items():
            try:
                num_bytes = folder.size(file)
            except OSError as error:
                raise CheckpointError(f"{folder}/{file}: cannot be read: {error}") from None
            if num_bytes < end:
                raise CheckpointError(
                    f"{folder}/{file}: damaged: has {num_bytes} bytes, but its tensors end at byte {end}"
                )


class _CachingReader(FolderReader):
    """A reader that reads the metadata once, instead of once per tensor."""

    @cached_property
    def _metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata
