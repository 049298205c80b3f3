"""Who am I among how many: torchrun's or Slurm's variables -> `World`; none -> one process. Imports no torch.

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
    """From RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them; else from what Slurm tells a task of `srun`.

    Raises ConfigError if only some are there, or if they make no sense.
    """
    host = environ.get("SLURMD_NODENAME") or socket.gethostname()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    missing = [name for name in names if name not in environ]
    if len(missing) == len(names):
        # In a batch script or a shell, outside any step, the variables of tasks are set too, but none is started.
        if "SLURM_STEP_ID" not in environ or environ.get("SLURM_NTASKS", "1") == "1":
            return World(host=host)
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
            raise ConfigError(
                f"environment: {environ['SLURM_NTASKS']} tasks of Slurm, but MASTER_ADDR and MASTER_PORT do not say "
                "where they meet; start with: dist-llm submit, or sbatch slurm/train.sbatch"
            )
    elif missing:
        raise ConfigError(
            f"environment: {', '.join(missing)} is not set though others of {', '.join(names)} are; "
            "start with torchrun, or unset them all to run one process"
        )
    given = ", ".join(f"{name}={environ.get(name)}" for name in names)
    try:
        rank, size, local_rank = (int(environ.get(name, "")) for name in names)
    except ValueError:
        raise ConfigError(f"environment: {given} must be whole numbers; start with torchrun") from None
    if not (0 <= rank < size and 0 <= local_rank < size):
        raise ConfigError(
            f"environment: {given}: {names[0]} and {names[2]} must be at least 0 and below {names[1]}; "
            "start with torchrun"
        )
    return World(rank, size, local_rank, host)
