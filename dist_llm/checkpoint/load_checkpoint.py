"""Load the tensors and the progress of a checkpoint, into any layout of the model over ranks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder, FolderReader
from dist_llm.checkpoint.checkpoint_state import CheckpointState, Progress
from dist_llm.checkpoint.checkpoint_write import (
    ignore_no_group_warning,
)
from dist_llm.checkpoint.flat_shard import FlatShard, chunk_at
from dist_llm.checkpoint.metadata import convert_read_errors
from dist_llm.errors import CheckpointError

PROGRESS_FILE = "progress.json"


def load_checkpoint(folder: CheckpointFolder | Path, state: CheckpointState, with_moments: bool = True) -> Progress:
    """Read the weights, and the moments if `with_moments`, into the layout of the ranks.

    Raises CheckpointError if the checkpoint lacks a parameter of this rank or has it in another shape. Other parameters
    in the checkpoint are no error, because a pipeline stage reads only its own.
    """
    folder = CheckpointFolder(folder)
    saved = read_shapes(folder)
    tensors = state.weights()
    check_shapes(folder, tensors, saved)
    if with_moments:
        state.allocate_moments(saved)
        tensors |= state.moments()
    fill_tensors(folder, tensors)
    state.after_load()
    return read_progress(folder)


def read_shapes(folder: CheckpointFolder | Path) -> dict[str, tuple[int, ...]]:
    """Return {name: full shape} of all tensors in a checkpoint."""
    return {
        name: tuple(entry.size)
        for name, entry in FolderReader(CheckpointFolder(folder)).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def fill_tensors(folder: CheckpointFolder | Path, state: dict[str, Any]) -> None:
    """Read the tensors of `state` ({name: tensor, DTensor or FlatShard}) in place. Each rank reads its own shards."""
    is_single_process = not dist.is_initialized()
    if is_single_process:
        ignore_no_group_warning()
    with convert_read_errors(folder):
        state_dict_loader.load(
            state,
            storage_reader=FolderReader(CheckpointFolder(folder)),
            planner=_FlatShardLoadPlanner(),
            no_dist=is_single_process,
        )


class _FlatShardLoadPlanner(DefaultLoadPlanner):
    """A load planner that supports FlatShard. The default planner would replace a FlatShard by None."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        tensor = self.state_dict[index.fqn]
        chunk: Tensor = chunk_at(tensor, index) if isinstance(tensor, FlatShard) else super().lookup_tensor(index)
        return chunk


def check_shapes(
    folder: CheckpointFolder | Path, expected: Mapping[str, Any], saved: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless `saved` (name -> shape) has all tensors of `expected`, with equal shapes."""
    for name, tensor in expected.items():
        shape = tuple(tensor.shape)
        if saved.get(name) != shape:
            actual = f"shape {list(saved[name])}" if name in saved else "no such parameter"
            raise CheckpointError(
                f"{folder}: {name} has shape {list(shape)} in the config, but the checkpoint has {actual}; "
                "use the `model` section the run was started with, or another run.dir"
            )


def read_progress(folder: CheckpointFolder) -> Progress:
    """Return the progress of the run in a checkpoint. Raises CheckpointError if the file is damaged."""
    try:
        return Progress.parse(folder.read(PROGRESS_FILE))
    except OSError as error:
        raise CheckpointError(f"{folder}/{PROGRESS_FILE}: cannot be read: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder}/{PROGRESS_FILE}: is damaged: {error}; use another checkpoint") from None
