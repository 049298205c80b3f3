"""Writing a checkpoint: tensors as they are now, by a thread, while training goes on.

All ranks copy their parts into buffers, which takes less than a step, and hand them to the thread. There all ranks
write, tell each other what they wrote or what went wrong, and rank 0 commits: all succeed, or all raise the same.
"""

import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from dist_llm.checkpoint import manifest
from dist_llm.checkpoint.flat_shard import FlatShard, Offset, chunk_at
from dist_llm.checkpoint.folder import FileRecord, Folder, FolderWriter
from dist_llm.errors import CheckpointError, UserError
from dist_llm.launch.flight_recorder import CHECKPOINT_GROUP
from dist_llm.parallel.mesh import to_local

Result = TypeVar("Result")
WRITE_TIMEOUT = timedelta(hours=2)  # that one rank waits for another


class CheckpointGroup:
    """The ranks that write together, in a group of their own, since the step uses the others meanwhile."""

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = None
        if dist.is_initialized():
            self.group = dist.new_group(backend="gloo", timeout=WRITE_TIMEOUT, group_desc=CHECKPOINT_GROUP)
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if self.group is not None else (0, 1)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def run_on_all(self, action: Callable[[], Result]) -> list[Result]:
        """What `action` returned on each rank. Where it raised on any, the first of these as the same error on all."""
        result, problem = None, None
        try:
            result = action()
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            problem = isinstance(error, CheckpointException), _describe_error(error)
        if self.group is None:
            every = [(result, problem)]
        else:
            every = [(None, None)] * self.size
            dist.all_gather_object(every, (result, problem), group=self.group)
        if problems := [problem for _, problem in every if problem is not None]:
            raise CheckpointError(min(problems)[1])  # from who met it, rather than from who heard of it
        return [result for result, _ in every]  # type: ignore[misc]


class StagingBuffers:
    """Host copies of a state's tensors (of this rank's parts), in buffers that the next copy uses again."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, Offset], Tensor] = {}

    def copy(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The values of now. Returns when they are there."""
        values = {name: self._copy_entry(name, held) for name, held in state.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return values

    def _copy_entry(self, name: str, held: Any) -> Any:
        if not isinstance(held, FlatShard):
            return self._copy_to_buffer((name, ()), to_local(held))
        return FlatShard(held.shape, {at: self._copy_to_buffer((name, at), piece) for at, piece in held.chunks.items()})

    def _copy_to_buffer(self, key: tuple[str, Offset], tensor: Tensor) -> Tensor:
        buffer = self.buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self.buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer.copy_(tensor, non_blocking=True)


class CheckpointWrite(threading.Thread):
    """One checkpoint on its way to `folder`. `values` are what to write for `state`, which says what lies where.

    `afterwards` is called on rank 0 once it is committed. A rank writes `few_files`, or else one for each tensor, and
    then no more than one at a time is held here.
    """

    def __init__(
        self,
        team: CheckpointGroup,
        folder: Folder,
        state: Mapping[str, Any],
        values: Mapping[str, Any],
        files: Mapping[str, bytes],
        on_commit: Callable[[], None] = lambda: None,
        few_files: bool = True,
    ) -> None:
        super().__init__(name=f"writes {folder.name}", daemon=True)
        self.team, self.folder, self.state, self.values, self.files = team, folder, state, values, files
        self.on_commit, self.few_files = on_commit, few_files
        self.error: CheckpointError | None = None
        self.committed = False

    def run(self) -> None:
        try:
            self._write()
        except CheckpointError as error:
            self.error = CheckpointError(f"{self.folder}: cannot be written: {error}")
        except Exception as error:  # a rank that is gone, most likely: it has said why
            self.error = CheckpointError(f"{self.folder}: cannot be written: {type(error).__name__}: {error}")

    def finish(self) -> None:
        """Wait for it. Raises CheckpointError, the same on all ranks, where it failed."""
        if self.ident is not None:  # else it ran in the caller's thread
            self.join()
        if self.error is not None:
            raise self.error

    def _write(self) -> None:
        team, folder = self.team, self.folder
        writer = FolderWriter(folder, self.few_files)
        try:
            team.run_on_all(lambda: self._create_folder() if team.is_main else None)
            team.run_on_all(lambda: self._write_tensors(writer))
            files = {
                name: each for written in team.run_on_all(lambda: writer.file_records) for name, each in written.items()
            }
            team.run_on_all(lambda: self._commit(files) if team.is_main else None)
        except Exception:
            if team.is_main and not self.committed:
                with suppress(OSError):
                    folder.remove()
            raise
        if team.is_main:
            self.on_commit()

    def _create_folder(self) -> None:
        self.folder.remove()
        self.folder.create()

    def _write_tensors(self, writer: FolderWriter) -> None:
        if self.team.group is None:
            ignore_no_group_warning()
        try:
            state_dict_saver.save(
                dict(self.state),
                storage_writer=writer,
                planner=_Planner(self.values),
                process_group=self.team.group,
                no_dist=self.team.group is None,
            )
        except (Exception, CheckpointException):
            if writer.error is not None:  # torch says only that something failed
                raise writer.error from None
            raise

    def _commit(self, files: Mapping[str, FileRecord]) -> None:
        small = {name: manifest.write_file(self.folder, name, content) for name, content in self.files.items()}
        manifest.commit(self.folder, {**files, **small})
        self.committed = True


def ignore_no_group_warning() -> None:
    """torch warns where it is used without a process group that it takes this for a world of one. It is."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")


class _Planner(DefaultSavePlanner):
    """Plans as the state lies; writes the values that were copied of it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__()
        self.values = values

    def lookup_object(self, index: MetadataIndex) -> Any:
        return chunk_at(self.values[index.fqn], index)


def _describe_error(error: BaseException) -> str:
    """In one line: the rank, and the first cause out of what torch wraps around it."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if isinstance(error, CheckpointException):
        rank, (error, _) = min(error.failures.items(), key=lambda item: item[0])
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error) if isinstance(error, OSError | UserError) else f"{type(error).__name__}: {error}"
    return f"rank {rank}: {text}" if dist.is_initialized() else text
