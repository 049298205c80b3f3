"""Manage the checkpoints of a run: list, verify, write, prune and load them. A load works for any layout.

checkpoints/step_00000500/
    __0_0.distcp .metadata     torch.distributed.checkpoint's own files
    progress.json              step, samples, tokens
    config.yaml tokenizer.json environment.json data.json
    manifest.json              size and hash of each file above
    COMMITTED                  written last; a directory without it is not a checkpoint
"""

import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder, FolderReader
from dist_llm.checkpoint.checkpoint_state import CheckpointState, Progress
from dist_llm.checkpoint.checkpoint_write import (
    CheckpointGroup,
    CheckpointWrite,
    StagingBuffers,
    ignore_no_group_warning,
)
from dist_llm.checkpoint.flat_shard import FlatShard, chunk_at
from dist_llm.checkpoint.manifest import MANIFEST_FILE, MARKER_FILE, DamagedError, read_manifest, verify_checkpoint
from dist_llm.checkpoint.metadata import convert_read_errors
from dist_llm.config.data_sections import CACHE
from dist_llm.config.load import load_config
from dist_llm.config.schema import CheckpointConfig
from dist_llm.data.remote import fetch
from dist_llm.errors import CheckpointError
from dist_llm.sharded import to_local

log = logging.getLogger("dist_llm")

PROGRESS_FILE = "progress.json"
NAME_PATTERN = re.compile(r"step_\d{8,}")


class CheckpointStore:
    """The checkpoints in one directory, given by a path or a URL.

    All ranks must call `find_latest_verified`, `save`, `poll` and `finish` together.
    """

    def __init__(self, directory: CheckpointFolder | Path | str, config: CheckpointConfig | None = None) -> None:
        self.directory, self.config = CheckpointFolder(directory), config or CheckpointConfig()
        self.staging = StagingBuffers()
        self.group: CheckpointGroup | None = None
        self.current_write: CheckpointWrite | None = None

    def list_committed(self) -> list[CheckpointFolder]:
        """Return the checkpoints that have a marker, oldest first. They may be damaged."""
        return [folder for folder in self._list_named() if MARKER_FILE in folder.list_names()]

    def _list_named(self) -> list[CheckpointFolder]:
        """Return the directories with the name of a checkpoint. Other directories are never removed."""
        return [self.directory / name for name in self.directory.list_names() if NAME_PATTERN.fullmatch(name)]

    def find_latest_unverified(self) -> CheckpointFolder | None:
        """Return the latest checkpoint whose small files are undamaged; None if there is none. No communication."""
        for folder in reversed(self.list_committed()):
            with suppress(DamagedError):
                verify_checkpoint(folder, with_tensors=False)
                return folder
        return None

    def find_latest_verified(self) -> CheckpointFolder | None:
        """Return the latest undamaged checkpoint; None if there is no checkpoint.

        The ranks share the work of hashing all files. Raises CheckpointError on all ranks if all checkpoints are
        damaged or a file cannot be read.
        """
        group = self._get_group()
        committed = group.run_and_all_gather(lambda: self.list_committed() if group.is_main else [])[0]
        for folder in reversed(committed):
            problems = group.run_and_all_gather(partial(_find_damage, folder, group.rank, group.world_size))
            if not (problem := next(filter(None, problems), "")):
                return folder
            log.warning("%s; skipping it; an older checkpoint is used if there is one", problem)
        if committed:
            raise CheckpointError(
                f"{self.directory}: all {len(committed)} checkpoints are damaged; to start a new run, move them "
                "away or set another run.dir"
            )
        return None

    def save(self, state: CheckpointState, progress: Progress, files: Mapping[str, bytes]) -> None:
        """Start to write the tensors of all ranks and the small `files`. `poll` or `finish` completes the save.

        Raises CheckpointError if the previous save failed.
        """
        self.finish()
        tensors = state.weights() | state.moments()
        folder = self.directory / f"step_{progress.step:08d}"
        files = {PROGRESS_FILE: json.dumps(progress.as_dict()).encode(), **files}
        in_background = self.config.background
        if in_background:
            values = self.staging.copy(tensors)
        else:
            values = {name: to_local(tensor) for name, tensor in tensors.items()}
        self.current_write = CheckpointWrite(
            self._get_group(), folder, tensors, values, files, lambda: self._prune(folder)
        )
        if in_background:
            self.current_write.start()
        else:
            self.current_write.run()
            self.finish()

    def poll(self) -> None:
        """Call `finish` if a checkpoint is being written and the writes of all ranks have ended."""
        if self.current_write is None:
            return
        has_ended = torch.tensor(int(not self.current_write.is_alive()))
        if dist.is_initialized():
            dist.all_reduce(has_ended, dist.ReduceOp.MIN)
        if has_ended:
            self.finish()

    def finish(self) -> None:
        """Wait for the current write and log it.

        Raises the same CheckpointError on all ranks if the write failed.
        """
        if self.current_write is None:
            return
        write, self.current_write = self.current_write, None
        wait_start = time.perf_counter()
        try:
            write.finish()
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}. Earlier checkpoints are unchanged. Free some space or fix the directory, and "
                "restart: the run resumes from the latest checkpoint"
            ) from None
        log.info("saved %s", write.folder)
        if (wait_seconds := time.perf_counter() - wait_start) > 1:
            log.info("waited %.1f s for the write", wait_seconds)

    def wait(self) -> None:
        """Wait for the current write without raising its error. Called before the process exits with another error."""
        if self.current_write is not None:
            self.current_write.join()

    def _get_group(self) -> CheckpointGroup:
        self.group = self.group or CheckpointGroup()
        return self.group

    def _prune(self, newest: CheckpointFolder) -> None:
        """Remove old checkpoints and the leftovers of interrupted saves, after `newest` was committed.

        Checkpoints of later steps than `newest` are damaged ones that the resume skipped. They are kept, and do not
        count towards `checkpoint.keep`.
        """
        try:
            committed = [folder.name for folder in self.list_committed()]
            candidates = [name for name in committed if name <= newest.name]
            names_to_keep = set(committed) - set(candidates) | set(candidates[-self.config.keep :])
            if interval := self.config.keep_every:
                names_to_keep |= {name for name in candidates if int(name.removeprefix("step_")) % interval == 0}
            if self.config.keep_best:
                losses = {name: _read_heldout_loss(self.directory / name) for name in candidates}
                evaluated = [name for name in candidates if math.isfinite(losses[name])]
                names_to_keep |= set(sorted(evaluated, key=lambda name: losses[name])[: self.config.keep_best])
            for folder in self._list_named():
                if folder.name not in names_to_keep:
                    folder.remove(MARKER_FILE)  # first, so that a partly removed checkpoint does not look complete
                    folder.remove()
        except Exception as error:  # each file system raises its own errors, and training can continue
            log.warning("%s: old checkpoints cannot be removed: %s", self.directory, error)


def fetch_verified_checkpoint(location: Path | str, rank: int = 0, world_size: int = 1) -> Path:
    """Fetch and verify the checkpoint that `resolve_checkpoint` finds at `location`, and return its local path.

    A remote checkpoint is copied to the cache. A local one stays where it is. The hashes of every `world_size`-th file,
    beginning with file `rank`, are checked. Raises CheckpointError if there is no checkpoint or it is damaged, and
    DataError if it cannot be fetched.
    """
    folder = resolve_checkpoint(location)
    path = folder.local_path or _download(folder)
    try:
        verify_checkpoint(CheckpointFolder(path), rank, world_size)
    except DamagedError as error:
        alternatives = [
            candidate
            for candidate in CheckpointStore(folder.location.rpartition("/")[0]).list_committed()
            if candidate != folder
        ]
        raise DamagedError(f"{error}{f'; another: {alternatives[-1]}' if alternatives else ''}") from None
    return path


def resolve_checkpoint(location: Path | str) -> CheckpointFolder:
    """Return the checkpoint at `location`, which is a path or a URL.

    `location` is a checkpoint, a directory of checkpoints or a run directory. For the latter two, the result is the
    latest checkpoint. Raises CheckpointError if there is none.
    """
    folder = CheckpointFolder(location)
    if MARKER_FILE in folder.list_names():
        return folder
    committed = CheckpointStore(folder).list_committed() or checkpoints_of_run(folder).list_committed()
    if not committed:
        raise CheckpointError(
            f"{location}: has no complete checkpoint; give a run directory (the run.dir of `dist-llm train`) "
            f"or one of its checkpoints/step_* directories that has a {MARKER_FILE} file"
        )
    return committed[-1]


def checkpoints_of_run(run: CheckpointFolder | Path | str) -> CheckpointStore:
    """Return the checkpoints of the run in directory `run`, also if its config has another checkpoint.dir."""
    run = CheckpointFolder(run)
    if run.local_path is not None and (run.local_path / "config.yaml").exists():
        config, _ = load_config(run.local_path / "config.yaml")
        if config is not None and config.checkpoint.dir:
            return CheckpointStore(config.checkpoint.dir)
    return CheckpointStore(run / "checkpoints")


def _download(folder: CheckpointFolder) -> Path:
    """Copy a remote checkpoint to the cache and verify each file. Return the local path."""
    key = hashlib.sha256(folder.location.encode() + folder.read(MARKER_FILE)).hexdigest()
    target = Path(CACHE).expanduser() / "checkpoints" / key / folder.name
    for name, record in read_manifest(folder).items():
        fetch(f"{folder}/{name}", target / name, record.bytes, record.hash)
    for name in (MANIFEST_FILE, MARKER_FILE):
        fetch(f"{folder}/{name}", target / name, None, None)
    return target


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
    """Fill the tensors of `state` in place. Each rank reads its own shards."""
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


def _read_heldout_loss(folder: CheckpointFolder) -> float:
    """Return the held-out loss of a checkpoint; NaN if there is none or the file is damaged."""
    with suppress(CheckpointError):
        loss = read_progress(folder).heldout_loss
        return math.nan if loss is None else loss
    return math.nan


def _find_damage(folder: CheckpointFolder, rank: int, world_size: int) -> str:
    """Verify a checkpoint. Return the description of the damage; an empty string if there is none."""
    try:
        verify_checkpoint(folder, rank, world_size)
    except DamagedError as error:
        return str(error)
    return ""


def read_progress(folder: CheckpointFolder) -> Progress:
    """Return the progress of the run in a checkpoint. Raises CheckpointError if the file is damaged."""
    try:
        return Progress.parse(folder.read(PROGRESS_FILE))
    except OSError as error:
        raise CheckpointError(f"{folder}/{PROGRESS_FILE}: cannot be read: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder}/{PROGRESS_FILE}: is damaged: {error}; use another checkpoint") from None
