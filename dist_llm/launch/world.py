"""Who am I among how many: torchrun's variables -> `World`; none -> one process. Imports no torch.

This package is the only place that reads or sets the environment.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from dist_llm.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This rank's place. `local_rank` picks its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    host: str = "localhost"

    @property
    def main(self) -> bool:
        """The rank that prints and writes."""
        return self.rank == 0


def read_world(environ: Mapping[str, str] = os.environ) -> World:
    """From RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them.

    Raises ConfigError if only some are there, or if they make no sense.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    missing = [name for name in names if name not in environ]
    if len(missing) == len(names):
        return World(host=socket.gethostname())
    if missing:
        raise ConfigError(
            f"environment: {', '.join(missing)} is not set though others of {', '.join(names)} are; "
            "start with torchrun, or unset them all to run one process"
        )
    given = ", ".join(f"{name}={environ[name]}" for name in names)
    try:
        rank, size, local_rank = (int(environ[name]) for name in names)
    except ValueError:
        raise ConfigError(f"environment: {given} must be whole numbers; start with torchrun") from None
    if not (0 <= rank < size and 0 <= local_rank < size):
        raise ConfigError(
            f"environment: {given}: RANK and LOCAL_RANK must be at least 0 and below WORLD_SIZE; start with torchrun"
        )
    return World(rank, size, local_rank, socket.gethostname())
