"""Write a checkpoint in a background thread while training continues.

All ranks copy their shards to staging buffers, which takes less than a step, and start the thread. The threads write
the copies and exchange file records and errors, and rank 0 commits. All ranks succeed, or all raise the same error.
"""

import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from dist_llm.checkpoint import manifest
from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder, FileRecord, FolderWriter
from dist_llm.checkpoint.flat_shard import FlatShard, Offset, chunk_at
from dist_llm.errors import CheckpointError, UserError
from dist_llm.launch.flight_recorder import CHECKPOINT_GROUP
from dist_llm.sharded import to_local

Result = TypeVar("Result")
WRITE_TIMEOUT = timedelta(hours=2)  # timeout of the collectives in which ranks wait for each other


class _Failure(NamedTuple):
    """Why an action failed on a rank."""

    is_of_other_rank: bool  # torch only reports the error of another rank
    message: str


class CheckpointGroup:
    """The process group of checkpoint writes. Training uses the other process groups at the same time."""

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT, group_desc=CHECKPOINT_GROUP)
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if self.group is not None else (0, 1)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def run_and_all_gather(self, action: Callable[[], Result]) -> list[Result]:
        """Call `action` on this rank, and return the results of all ranks, by rank. All ranks must call this.

        If the action of one rank raises, all ranks raise the same CheckpointError.
        """
        result, failure = None, None
        try:
            result = action()
        except (Exception, CheckpointException) as error:  # CheckpointException is not a subclass of Exception
            failure = _Failure(isinstance(error, CheckpointException), _describe_error(error))
        if self.group is None:
            by_rank = [(result, failure)]
        else:
            by_rank = [(None, None)] * self.world_size
            dist.all_gather_object(by_rank, (result, failure), group=self.group)
        if failures := [failure for _, failure in by_rank if failure is not None]:
            # The smallest tuple is of a rank where an error originated, not of one that only saw the failure.
            raise CheckpointError(min(failures).message)
        return [result for result, _ in by_rank]  # type: ignore[misc]


class StagingBuffers:
    """Host buffers with copies of the tensors of this rank. Each checkpoint reuses them."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, Offset], Tensor] = {}

    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return copies of the current values. The copies are complete on return."""
        values = {name: self._copy_entry(name, tensor) for name, tensor in state.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return values

    def _copy_entry(self, name: str, tensor: Any) -> Any:
        if not isinstance(tensor, FlatShard):
            return self._copy_to_buffer((name, ()), to_local(tensor))
        return FlatShard(
            tensor.shape,
            {offset: self._copy_to_buffer((name, offset), chunk) for offset, chunk in tensor.chunks.items()},
        )

    def _copy_to_buffer(self, key: tuple[str, Offset], tensor: Tensor) -> Tensor:
        buffer = self.buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self.buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor, non_blocking=True)


class CheckpointWrite(threading.Thread):
    """A thread that writes one checkpoint to `folder`.

    `state` determines the layout: {name: tensor, DTensor or FlatShard}. `values` has the tensors of this rank to write,
    by the same names. `files` are small files {name: content}. Rank 0 calls `on_commit` after the commit. With
    `few_files`, a rank writes few files. Otherwise it writes one file per tensor, and has at most one tensor in memory.
    """

    def __init__(
        self,
        group: CheckpointGroup,
        folder: CheckpointFolder,
        state: Mapping[str, Any],
        values: Mapping[str, Any],
        files: Mapping[str, bytes],
        on_commit: Callable[[], None] = lambda: None,
        few_files: bool = True,
    ) -> None:
        super().__init__(name=f"writes {folder.name}", daemon=True)
        self.group, self.folder, self.state, self.values, self.files = group, folder, state, values, files
        self.on_commit, self.few_files = on_commit, few_files
        self.error: CheckpointError | None = None
        self.committed = False

    def run(self) -> None:
        try:
            self._write()
        except CheckpointError as error:
            self.error = CheckpointError(f"{self.folder}: cannot be written: {error}")
        except Exception as error:  # most likely another rank died, which reports its own error
            self.error = CheckpointError(f"{self.folder}: cannot be written: {type(error).__name__}: {error}")

    def finish(self) -> None:
        """Wait for the write. Raises the same CheckpointError on all ranks if it failed."""
        if self.ident is not None:  # otherwise the caller has called `run` directly
            self.join()
        if self.error is not None:
            raise self.error

    def _write(self) -> None:
        group, folder = self.group, self.folder
        writer = FolderWriter(folder, few_files=self.few_files)
        try:
            group.run_and_all_gather(lambda: self._create_folder() if group.is_main else None)
            group.run_and_all_gather(lambda: self._write_tensors(writer))
            files = {
                name: record
                for records in group.run_and_all_gather(lambda: writer.file_records)
                for name, record in records.items()
            }
            group.run_and_all_gather(lambda: self._commit(files) if group.is_main else None)
        except Exception:
            if group.is_main and not self.committed:
                with suppress(OSError):
                    folder.remove()
            raise
        if group.is_main:
            self.on_commit()

    def _create_folder(self) -> None:
        """Create the directory, without files of an earlier interrupted write."""
        self.folder.remove()
        self.folder.create()

    def _write_tensors(self, writer: FolderWriter) -> None:
        if self.group.group is None:
            ignore_no_group_warning()
        try:
            state_dict_saver.save(
                dict(self.state),
                storage_writer=writer,
                planner=_StagedSavePlanner(self.values),
                process_group=self.group.group,
                no_dist=self.group.group is None,
            )
        except (Exception, CheckpointException):
            if writer.error is not None:  # the error of torch lacks the cause
                raise writer.error from None
            raise

    def _commit(self, files: Mapping[str, FileRecord]) -> None:
        small_files = {name: manifest.write_file(self.folder, name, content) for name, content in self.files.items()}
        manifest.commit(self.folder, {**files, **small_files})
        self.committed = True


def ignore_no_group_warning() -> None:
    """Silence the warning of torch that it assumes a single process if there is no process group, which is intended."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")


class _StagedSavePlanner(DefaultSavePlanner):
    """A save planner that plans the layout from the live state, and writes the staged copies."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values

    def lookup_object(self, index: MetadataIndex) -> Any:
        return chunk_at(self.values[index.fqn], index)


def _describe_error(error: BaseException) -> str:
    """Describe an error in one line: the rank, and the root cause of wrapped errors."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if isinstance(error, CheckpointException):
        rank, (error, _) = min(error.failures.items(), key=lambda item: item[0])
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error) if isinstance(error, OSError | UserError) else f"{type(error).__name__}: {error}"
    return f"rank {rank}: {text}" if dist.is_initialized() else text
