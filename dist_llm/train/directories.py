"""The directories that a run writes to: its own and that of its checkpoints. Locked before anything is written."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dist_llm.checkpoint.folder import Folder
from dist_llm.config.schema import Config
from dist_llm.launch.run_lock import RunLock, this_process
from dist_llm.launch.world import World


@contextmanager
def lock_directories(config: Config, checkpoints: Folder, world: World) -> Iterator[None]:
    """For the time of the block this run alone writes to its directories; rank 0 holds their locks.

    Checkpoints at a URL are not locked: object stores have no exclusive creation that fsspec offers.
    Raises ConfigError where another run holds a lock, or a directory cannot be written.
    """
    with ExitStack() as locks:
        if world.main:
            locks.enter_context(RunLock(Path(config.run.dir), this_process(world.host)))
            if checkpoints.local is not None and not _is_same(checkpoints.local, Path(config.run.dir)):
                key = "checkpoint.dir" if config.checkpoint.dir else "run.dir"
                locks.enter_context(RunLock(checkpoints.local, this_process(world.host), key))
        yield


def _is_same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
