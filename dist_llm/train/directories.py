"""The directories that a run writes to: its own and that of its checkpoints.

They are locked, and tried out, before anything is written: what would fail at the first checkpoint fails at the start.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

from dist_llm.checkpoint.checkpoint_size import count_checkpoint_bytes
from dist_llm.checkpoint.folder import Folder
from dist_llm.config.schema import Config
from dist_llm.errors import ConfigError
from dist_llm.launch.run_lock import RunLock, this_process
from dist_llm.launch.world import World


@contextmanager
def open_directories(config: Config, checkpoints: Folder, world: World, saves: bool = True) -> Iterator[None]:
    """For the time of the block this run alone writes to its directories; rank 0 holds their locks.

    Checkpoints at a URL are not locked: object stores have no exclusive creation that fsspec offers. Unless the run
    `saves` nothing more, there must be room for one checkpoint.

    Raises ConfigError where another run holds a lock, or a directory cannot be written or is too small.
    """
    run, key = Path(config.run.dir), "checkpoint.dir" if config.checkpoint.dir else "run.dir"
    with ExitStack() as locks:
        if world.main:
            locks.enter_context(RunLock(run, this_process(world.host)))
            if checkpoints.local is not None and checkpoints.local.resolve() != run.resolve():
                locks.enter_context(RunLock(checkpoints.local, this_process(world.host), key))
            if checkpoints.local is not None and saves:
                check_room(checkpoints.local, count_checkpoint_bytes(config), key)
        if saves and (world.local_rank == 0 if checkpoints.local is not None else world.main):
            check_writable(checkpoints, key)
        yield


def check_writable(folder: Folder, key: str) -> None:
    """Raises ConfigError unless a file can be written there from this node."""
    probe = f"probe-{uuid4().hex}"
    try:
        folder.create()
        folder.write(probe, b"can this be written?")
        folder.remove(probe)
    except Exception as error:  # each file system has errors of its own
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{key}: {folder} cannot be written: {reason}; make it writable, or set another {key}"
        ) from None


def check_room(directory: Path, needed: int, key: str) -> None:
    """Raises ConfigError where the file system of a directory has less than `needed` bytes left for this user."""
    usage = shutil.disk_usage(directory)
    if usage.total and usage.free < needed:
        raise ConfigError(
            f"{key}: {directory} has room for {usage.free:,} bytes, but one checkpoint takes {needed:,} (weights and "
            f"moments); make room, or set another {key}"
        )
