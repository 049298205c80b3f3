"""Open the directories that a run writes to: the run directory and the checkpoint directory.

Both directories are locked and tested at the start of a run. Otherwise a directory that is full or not writable would
fail only at the first checkpoint.
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
def open_directories(
    config: Config, checkpoints: CheckpointFolder, world: World, saves_checkpoints: bool = True
) -> Iterator[None]:
    """Lock the run directory and the directory `checkpoints` on rank 0 until the block ends.

    Checkpoints at a URL are not locked, because fsspec offers no exclusive creation for object stores. If the run
    `saves_checkpoints`, the checkpoint directory must be writable and must have space for one checkpoint.

    Raises ConfigError if another run holds a lock, or a directory is not writable or too small.
    """
    run_dir, key = Path(config.run.dir), "checkpoint.dir" if config.checkpoint.dir else "run.dir"
    with ExitStack() as locks:
        if world.is_main:
            locks.enter_context(RunLock(run_dir, describe_this_process(world.host)))
            if checkpoints.local_path is not None and checkpoints.local_path.resolve() != run_dir.resolve():
                locks.enter_context(RunLock(checkpoints.local_path, describe_this_process(world.host), key))
            if checkpoints.local_path is not None and saves_checkpoints:
                check_free_space(checkpoints.local_path, count_checkpoint_bytes(config), key)
        is_writer = world.local_rank == 0 if checkpoints.local_path is not None else world.is_main
        if saves_checkpoints and is_writer:
            check_writable(checkpoints, key)
        yield


def check_writable(folder: CheckpointFolder, key: str) -> None:
    """Raise ConfigError unless this node can write a file in `folder`. `key` is the config key of the folder."""
    test_file = f"probe-{uuid4().hex}"
    try:
        folder.create()
        folder.write(test_file, b"can this be written?")
        folder.remove(test_file)
    except Exception as error:  # each file system raises its own errors
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{key}: {folder} cannot be written: {reason}; make it writable, or set another {key}"
        ) from None


def check_free_space(directory: Path, needed_bytes: int, key: str) -> None:
    """Raise ConfigError if the file system of a directory has less than `needed_bytes` free for this user."""
    usage = shutil.disk_usage(directory)
    if usage.total and usage.free < needed_bytes:
        raise ConfigError(
            f"{key}: {directory} has room for {usage.free:,} bytes, but one checkpoint takes {needed_bytes:,} "
            f"(weights and moments); make room, or set another {key}"
        )
