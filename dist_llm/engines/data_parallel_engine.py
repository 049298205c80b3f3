"""The base class of engines with data parallelism only: each rank reads different samples, in full sequences.

The DeepSpeed and accelerate engines derive from it.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_llm.config.schema import Config
from dist_llm.counter_rng import hash_seed
from dist_llm.models.decoder import Decoder
from dist_llm.objectives.batch import Batch
from dist_llm.optim.loss_scale import LossScale
from dist_llm.parallel.mesh import all_gather_ints
from dist_llm.parallel.replica_check import ReplicaGroups
from dist_llm.sharded import is_sharded


class DataParallelEngine:
    """The methods of `Engine` that data-parallel engines share. A process group must exist."""

    loss_scale: LossScale | None = None
    model: Decoder

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device

    @property
    def model_parts(self) -> list[Decoder]:
        return [self.model]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    @property
    def replicated_params(self) -> ReplicaGroups:
        """All parameters, if every rank holds them unsharded."""
        parameters = dict(self.named_parameters())
        if any(is_sharded(parameter) for parameter in parameters.values()):
            return []  # sharded by FSDP or by ZeRO stage 3
        return [(self.replica_group, parameters)]

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The process group of the ranks that hold the same parameters; None for all ranks."""
        return None

    @property
    def dp_rank_and_size(self) -> tuple[int, int]:
        return dist.get_rank(), dist.get_world_size()

    @property
    def coordinates(self) -> tuple[int, ...]:
        """The coordinates (pp, dp_replicate, dp_shard, cp) that this rank has in a mesh of the native engine."""
        return 0, 0, dist.get_rank(), 0

    def all_reduce_over_data(self, value: Tensor | int) -> Tensor:
        total = value.clone() if isinstance(value, Tensor) else torch.full((), value, device=self.device)
        dist.all_reduce(total)
        return total

    def all_gather_ints(self, value: int) -> list[int]:
        return all_gather_ints(value, self.device)

    def to_local_batch(self, batch: Batch) -> Batch:
        return batch.to(self.device)

    def seed_dropout(self, step: int, microbatch: int) -> None:
        """Seed dropout as the native engine does on a mesh with as many dp_shard ranks."""
        if self.config.model.dropout:
            tp_coordinate = (0,) if self.config.parallel.sequence_parallel else ()
            torch.manual_seed(hash_seed(self.config.run.seed, step, microbatch, *self.coordinates, *tp_coordinate))
