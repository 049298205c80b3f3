"""The directories that a run writes to: the run directory and the checkpoint directory.

They are locked and tested before anything is written, so that errors of the first checkpoint appear at the start.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.checkpoint.checkpoint_size import count_checkpoint_bytes
from dist_llm.config.schema import Config
from dist_llm.errors import ConfigError
from dist_llm.launch.run_lock import RunLock, describe_this_process
from dist_llm.launch.world import World


@contextmanager
def open_directories(config: Config, checkpoints: CheckpointFolder, world: World, saves: bool = True) -> Iterator[None]:
    """While open, only this run writes to its directories; rank 0 holds their locks.

    Checkpoints at a URL are not locked: fsspec offers no exclusive creation for object stores. If the run `saves`
    checkpoints, the directory must have room for one.

    Raises ConfigError if another run has a lock, or a directory is not writable or too small.
    """
    run, key = Path(config.run.dir), "checkpoint.dir" if config.checkpoint.dir else "run.dir"
    with ExitStack() as locks:
        if world.is_main:
            locks.enter_context(RunLock(run, describe_this_process(world.host)))
            if checkpoints.local_path is not None and checkpoints.local_path.resolve() != run.resolve():
                locks.enter_context(RunLock(checkpoints.local_path, describe_this_process(world.host), key))
            if checkpoints.local_path is not None and saves:
                check_free_space(checkpoints.local_path, count_checkpoint_bytes(config), key)
        if saves and (world.local_rank == 0 if checkpoints.local_path is not None else world.is_main):
            check_writable(checkpoints, key)
        yield


def check_writable(folder: CheckpointFolder, key: str) -> None:
    """Raise ConfigError unless this node can write a file in the directory."""
    probe = f"probe-{uuid4().hex}"
    try:
        folder.create()
        folder.write(probe, b"can this be written?")
        folder.remove(probe)
    except Exception as error:  # each file system raises its own errors
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{key}: {folder} cannot be written: {reason}; make it writable, or set another {key}"
        ) from None


def check_free_space(directory: Path, needed: int, key: str) -> None:
    """Raise ConfigError if the file system of a directory has less than `needed` bytes left for this user."""
    usage = shutil.disk_usage(directory)
    if usage.total and usage.free < needed:
        raise ConfigError(
            f"{key}: {directory} has room for {usage.free:,} bytes, but one checkpoint takes {needed:,} (weights and "
            f"moments); make room, or set another {key}"
        )
