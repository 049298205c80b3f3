"""Manage the checkpoints of a run: list, verify, write and remove them.

checkpoints/step_00000500/
    __0_0.distcp .metadata     torch.distributed.checkpoint's own files
    progress.json              step, samples, tokens
    config.yaml tokenizer.json environment.json data.json
    manifest.json              size and hash of each file above
    COMMITTED                  written last; a directory without it is not a checkpoint
"""

import json
import logging
import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.checkpoint_state import CheckpointState, Progress
from dist_llm.checkpoint.checkpoint_write import (
    CheckpointGroup,
    CheckpointWrite,
    StagingBuffers,
)
from dist_llm.checkpoint.load_checkpoint import PROGRESS_FILE, read_progress
from dist_llm.checkpoint.manifest import MARKER_FILE, DamagedError, verify_checkpoint
from dist_llm.config.schema import CheckpointConfig
from dist_llm.errors import CheckpointError
from dist_llm.sharded import to_local

log = logging.getLogger("dist_llm")

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
        """Return the latest checkpoint whose small files match their hashes; None if there is none.

        Files with tensors are not read, so they may be damaged. This rank works alone, without communication.
        """
        for folder in reversed(self.list_committed()):
            with suppress(DamagedError):
                verify_checkpoint(folder, with_tensors=False)
                return folder
        return None

    def find_latest_verified(self) -> CheckpointFolder | None:
        """Return the latest checkpoint whose files all match their hashes; None if there is no checkpoint.

        All ranks must call this. They share the work of hashing. Raises CheckpointError on all ranks if all
        checkpoints are damaged or a file cannot be read.
        """
        group = self._get_group()
        # Rank 0 lists the checkpoints for all ranks, because a shared file system may show each node another state.
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
            self._get_group(), folder, tensors, values, files, on_commit=lambda: self._prune(folder)
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
        if (wait_seconds := time.perf_counter() - wait_start) > 1.0:
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


def _read_heldout_loss(folder: CheckpointFolder) -> float:
    """Return the held-out loss of a checkpoint; NaN if there is none or the file is damaged."""
    with suppress(CheckpointError):
        loss = read_progress(folder).heldout_loss
        return math.nan if loss is None else loss
    return math.nan


def _find_damage(folder: CheckpointFolder, rank: int, world_size: int) -> str:
    """Return what is damaged in the part of a checkpoint that this rank checks; an empty string if nothing is."""
    try:
        verify_checkpoint(folder, rank, world_size)
    except DamagedError as error:
        return str(error)
    return ""
