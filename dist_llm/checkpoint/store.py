"""The checkpoints of a run: which there are, which are whole, which are kept; and reading them into any layout.

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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from dist_llm.checkpoint.checkpoint_state import CheckpointState, Progress
from dist_llm.checkpoint.checkpoint_write import (
    CheckpointGroup,
    CheckpointWrite,
    StagingBuffers,
    ignore_no_group_warning,
)
from dist_llm.checkpoint.flat_shard import FlatShard, chunk_at
from dist_llm.checkpoint.folder import Folder, FolderReader
from dist_llm.checkpoint.manifest import MANIFEST, MARKER, DamagedError, read_manifest, verify
from dist_llm.checkpoint.metadata import convert_read_errors
from dist_llm.config.load import load_config
from dist_llm.config.schema import CACHE, CheckpointConfig
from dist_llm.data.remote import fetch
from dist_llm.errors import CheckpointError
from dist_llm.parallel.mesh import to_local

log = logging.getLogger("dist_llm")

PROGRESS = "progress.json"
NAME = re.compile(r"step_\d{8,}")


class CheckpointStore:
    """The checkpoints in one directory, a path or a URL. Every rank calls `newest`, `save`, `poll` and `finish`."""

    def __init__(self, directory: Folder | Path | str, config: CheckpointConfig | None = None) -> None:
        self.directory, self.config = Folder(directory), config or CheckpointConfig()
        self.staging = StagingBuffers()
        self.group: CheckpointGroup | None = None
        self.current_write: CheckpointWrite | None = None

    def list_committed(self) -> list[Folder]:
        """Those with a marker, oldest first; whether they are damaged is not looked at."""
        return [folder for folder in self._list_named() if MARKER in folder.list_names()]

    def _list_named(self) -> list[Folder]:
        """Those that have the name of a checkpoint. What is called otherwise is not ours."""
        return [self.directory / name for name in self.directory.list_names() if NAME.fullmatch(name)]

    def peek_latest(self) -> Folder | None:
        """The newest whose small files are whole; without asking the other ranks."""
        for folder in reversed(self.list_committed()):
            with suppress(DamagedError):
                verify(folder, tensors=False)
                return folder
        return None

    def latest_verified(self) -> Folder | None:
        """The newest that is whole, every byte of it checked, each rank its part; None if there is none at all.

        Raises CheckpointError, on all ranks, where there are some and all are damaged, or one cannot be read.
        """
        group = self._get_group()
        every = group.run_on_all(lambda: self.list_committed() if group.is_main else [])[0]
        for folder in reversed(every):
            problems = group.run_on_all(lambda folder=folder: _find_damage(folder, group.rank, group.size))  # type: ignore[misc]
            if not (problem := next(filter(None, problems), "")):
                return folder
            log.warning("%s; it is passed over, and the one before it taken if there is one", problem)
        if every:
            raise CheckpointError(
                f"{self.directory}: all {len(every)} checkpoints are damaged; to begin anew, move them away or set "
                "another run.dir"
            )
        return None

    def save(self, held: CheckpointState, progress: Progress, files: Mapping[str, bytes]) -> None:
        """Begin to write what the ranks hold, and `files`, as they are now; `poll` and `finish` say how that went.

        Raises CheckpointError where the save before it failed.
        """
        self.finish()
        state = held.weights() | held.moments()
        folder = self.directory / f"step_{progress.step:08d}"
        files = {PROGRESS: json.dumps(progress.as_dict()).encode(), **files}
        background = self.config.background
        values = self.staging.copy(state) if background else {name: to_local(each) for name, each in state.items()}
        self.current_write = CheckpointWrite(
            self._get_group(), folder, state, values, files, lambda: self._prune(folder)
        )
        if background:
            self.current_write.start()
        else:
            self.current_write.run()
            self.finish()

    def poll(self) -> None:
        """While a checkpoint is being written: see whether all ranks are done, and if so, `finish`."""
        if self.current_write is None:
            return
        done = torch.tensor(int(not self.current_write.is_alive()))
        if dist.is_initialized():
            dist.all_reduce(done, dist.ReduceOp.MIN)
        if done:
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written, say so, and remove what need not be kept.

        Raises CheckpointError, the same on all ranks, where it could not be written.
        """
        if self.current_write is None:
            return
        writing, self.current_write = self.current_write, None
        begin = time.perf_counter()
        try:
            writing.finish()
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}. The checkpoints before it are as they were. Make room or mend the directory, and start "
                "again: the run goes on from the newest"
            ) from None
        log.info("saved %s", writing.folder)
        if (waited := time.perf_counter() - begin) > 1:
            log.info("waited %.1f s for it", waited)

    def wait(self) -> None:
        """Let what is being written be written, on the way out after whatever went wrong."""
        if self.current_write is not None:
            self.current_write.join()

    def _get_group(self) -> CheckpointGroup:
        self.group = self.group or CheckpointGroup()
        return self.group

    def _prune(self, newest: Folder) -> None:
        """Remove what need not be kept, and what killed saves left, now that `newest` is committed.

        Those of later steps were passed over as damaged when the run went on: they count for nothing, and stay.
        """
        try:
            committed = [folder.name for folder in self.list_committed()]
            ours = [name for name in committed if name <= newest.name]
            kept = set(committed) - set(ours) | set(ours[-self.config.keep :])
            if every := self.config.keep_every:
                kept |= {name for name in ours if int(name.removeprefix("step_")) % every == 0}
            if self.config.keep_best:
                losses = {name: _read_heldout_loss(self.directory / name) for name in ours}
                known = [name for name in ours if math.isfinite(losses[name])]
                kept |= set(sorted(known, key=lambda name: losses[name])[: self.config.keep_best])
            for folder in self._list_named():
                if folder.name not in kept:
                    folder.remove(MARKER)  # first: what is half removed must not look complete
                    folder.remove()
        except Exception as error:  # of whatever kind a file system has; no reason to stop
            log.warning("%s: what need not be kept cannot be removed: %s", self.directory, error)


def open_checkpoint(place: Path | str, part: int = 0, parts: int = 1) -> Path:
    """The checkpoint that `place` means, on this machine's disk: a copy in the cache, if it is far away.

    Of the hashes of its files every `parts`-th is checked, from `part` on. Raises CheckpointError where there is none
    or it is damaged, DataError where it cannot be fetched.
    """
    folder = resolve_checkpoint(place)
    path = folder.local or _download(folder)
    try:
        verify(Folder(path), part, parts)
    except DamagedError as error:
        others = [
            other for other in CheckpointStore(folder.location.rpartition("/")[0]).list_committed() if other != folder
        ]
        raise DamagedError(f"{error}{f'; another: {others[-1]}' if others else ''}") from None
    return path


def resolve_checkpoint(place: Path | str) -> Folder:
    """A checkpoint itself; or the newest of a directory of checkpoints, or of a run. A path or a URL.

    Raises CheckpointError where there is none.
    """
    folder = Folder(place)
    if MARKER in folder.list_names():
        return folder
    every = CheckpointStore(folder).list_committed() or checkpoints_of_run(folder).list_committed()
    if not every:
        raise CheckpointError(
            f"{place}: holds no complete checkpoint; give a run directory (the run.dir of `dist-llm train`) "
            f"or one of its checkpoints/step_* directories that has a {MARKER} file"
        )
    return every[-1]


def checkpoints_of_run(run: Folder | Path | str) -> CheckpointStore:
    """The checkpoints of the run in a directory, wherever its config says they are."""
    run = Folder(run)
    if run.local is not None and (run.local / "config.yaml").exists():
        config, _ = load_config(run.local / "config.yaml")
        if config is not None and config.checkpoint.dir:
            return CheckpointStore(config.checkpoint.dir)
    return CheckpointStore(run / "checkpoints")


def _download(folder: Folder) -> Path:
    """A copy in the cache, where each file is checked as it comes."""
    key = hashlib.sha256(folder.location.encode() + folder.read(MARKER)).hexdigest()
    target = Path(CACHE).expanduser() / "checkpoints" / key / folder.name
    for name, written in read_manifest(folder).items():
        fetch(f"{folder}/{name}", target / name, written.bytes, written.hash)
    for name in (MANIFEST, MARKER):
        fetch(f"{folder}/{name}", target / name, None, None)
    return target


def load(folder: Folder | Path, held: CheckpointState, moments: bool = True) -> Progress:
    """Read the weights, and the moments if they are wanted, into whatever layout the ranks have.

    Raises CheckpointError where the checkpoint lacks a parameter of the model or has it in another
    shape. (That it holds more is no error: a pipeline stage asks for its own part.)
    """
    folder = Folder(folder)
    saved = read_shapes(folder)
    state = held.weights()
    check_shapes(folder, state, saved)
    if moments:
        held.allocate_moments(saved)
        state |= held.moments()
    read_tensors(folder, state)
    held.after_load()
    return read_progress(folder)


def read_shapes(folder: Folder | Path) -> dict[str, tuple[int, ...]]:
    """{name: full shape} of every tensor in a checkpoint."""
    return {
        name: tuple(entry.size)
        for name, entry in FolderReader(Folder(folder)).read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_tensors(folder: Folder | Path, state: dict[str, Any]) -> None:
    """Fill the tensors of `state` in place; each rank gets what it holds of them."""
    alone = not dist.is_initialized()
    if alone:
        ignore_no_group_warning()
    with convert_read_errors(folder):
        state_dict_loader.load(state, storage_reader=FolderReader(Folder(folder)), planner=_Planner(), no_dist=alone)


class _Planner(DefaultLoadPlanner):
    """Knows boxes, of which torch's makes None where it looks for tensors on the meta device."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        held = self.state_dict[index.fqn]
        found: Tensor = chunk_at(held, index) if isinstance(held, FlatShard) else super().lookup_tensor(index)
        return found


def check_shapes(folder: Folder | Path, wanted: Mapping[str, Any], saved: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError unless `saved` has every tensor of `wanted`, in its shape."""
    for name, tensor in wanted.items():
        shape = tuple(tensor.shape)
        if saved.get(name) != shape:
            found = f"shape {list(saved[name])}" if name in saved else "no such parameter"
            raise CheckpointError(
                f"{folder}: {name} has shape {list(shape)} in the config, but the checkpoint has {found}; "
                "use the `model` section the run was started with, or another run.dir"
            )


def _read_heldout_loss(folder: Folder) -> float:
    """nan where it is not known, or the file is damaged."""
    with suppress(CheckpointError):
        loss = read_progress(folder).heldout_loss
        return math.nan if loss is None else loss
    return math.nan


def _find_damage(folder: Folder, part: int, parts: int) -> str:
    """What `verify` finds; empty if nothing."""
    try:
        verify(folder, part, parts)
    except DamagedError as error:
        return str(error)
    return ""


def read_progress(folder: Folder) -> Progress:
    """How far the run was. Raises CheckpointError where the file is damaged."""
    try:
        return Progress.parse(folder.read(PROGRESS))
    except OSError as error:
        raise CheckpointError(f"{folder}/{PROGRESS}: cannot be read: {error}") from None
    except ValueError as error:
        raise CheckpointError(f"{folder}/{PROGRESS}: is damaged: {error}; use another checkpoint") from None
