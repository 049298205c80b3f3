"""Read rank and world size from the environment variables of torchrun or Slurm. Without them, the run has one process.

Only this package (`launch`) reads or sets environment variables. This module does not import torch.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from dist_llm.errors import ConfigError

# Environment variables of launchers that are not supported: world size (variable -> launcher), and rank.
LAUNCHER_SIZES = {
    "OMPI_COMM_WORLD_SIZE": "mpirun (Open MPI)",
    "MV2_COMM_WORLD_SIZE": "mpirun (MVAPICH2)",
    "PMI_SIZE": "mpiexec or another PMI launcher",
    "JSM_NAMESPACE_SIZE": "jsrun",
    "FLUX_JOB_SIZE": "flux run",
    "HOROVOD_SIZE": "horovodrun",
}
LAUNCHER_RANKS = ("PMIX_RANK", "PMI_RANK", "PALS_RANKID", "ALPS_APP_PE")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class World:
    """Rank, world size, rank within the node (which selects the GPU) and host name."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    host: str = "localhost"

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes files."""
        return self.rank == 0


def read_world(environ: Mapping[str, str] = os.environ) -> World:
    """Read RANK, WORLD_SIZE and LOCAL_RANK as torchrun sets them, else the variables that `srun` sets for a task.

    Raises ConfigError if some of the variables are missing or inconsistent.
    """
    host = environ.get("SLURMD_NODENAME") or socket.gethostname()
    names = RANK_VARIABLES
    missing = [name for name in names if name not in environ]
    if len(missing) == len(names):
        # Slurm also sets the variables of a task in batch scripts and interactive shells, which are not tasks of srun.
        if "SLURM_STEP_ID" not in environ or environ.get("SLURM_NTASKS", "1") == "1":
            _refuse_other_launcher(environ)
            return World(host=host)
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        if "MASTER_ADDR" not in environ or "MASTER_PORT" not in environ:
            raise ConfigError(
                f"environment: {environ['SLURM_NTASKS']} Slurm tasks, but MASTER_ADDR and MASTER_PORT are not "
                "set; start with: dist-llm submit, or sbatch slurm/train.sbatch"
            )
    elif missing:
        raise ConfigError(
            f"environment: not set: {', '.join(missing)}; the others of {', '.join(names)} are set; "
            "start with torchrun, or unset them all to run one process"
        )
    assignments = ", ".join(f"{name}={environ.get(name)}" for name in names)
    try:
        rank, world_size, local_rank = (int(environ.get(name, "")) for name in names)
    except ValueError:
        raise ConfigError(f"environment: {assignments} must be whole numbers; start with torchrun") from None
    if not (0 <= rank < world_size and 0 <= local_rank < world_size):
        raise ConfigError(
            f"environment: {assignments}: {names[0]} and {names[2]} must be at least 0 and below {names[1]}; "
            "start with torchrun"
        )
    return World(rank=rank, world_size=world_size, local_rank=local_rank, host=host)


def _refuse_other_launcher(environ: Mapping[str, str]) -> None:
    """Raise ConfigError if MPI, PMI or another launcher started this process as one of several.

    Otherwise each process would train alone, and all of them would write to the same directory.
    """
    sizes = {name: environ[name] for name in LAUNCHER_SIZES if name in environ}
    ranks = {name: environ[name] for name in LAUNCHER_RANKS if name in environ}
    is_single_task = "SLURM_STEP_ID" in environ
    variable = next(((name, value) for name, value in sizes.items() if value != "1"), None)
    if variable is None and ranks and not sizes and not is_single_task:
        variable = next(iter(ranks.items()))  # the world size is unknown
    if variable is None:
        return
    name, value = variable
    launcher = LAUNCHER_SIZES.get(name, "a launcher that speaks PMI")
    raise ConfigError(
        f"environment: {name}={value} says that {launcher} started this process as one of several, but "
        f"{', '.join(RANK_VARIABLES)} are not set, so that each would train by itself in the same directory. "
        "Launch the ranks with: torchrun --nproc-per-node N -m dist_llm ...; on Slurm: dist-llm submit. "
        f"Or let a wrapper set {', '.join(RANK_VARIABLES)}, MASTER_ADDR and MASTER_PORT for each process. "
        f"To run only one process, unset {name}"
    )
