"""The base class of the third-party engines, DeepSpeed and accelerate, which are data-parallel.

Each data-parallel rank reads different samples. These engines do not split sequences or matrix products over ranks. The
DeepSpeed engine with a pipeline (deepspeed_pipeline.py) splits the model into stages.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_llm.config.schema import Config
from dist_llm.counter_rng import hash_seed
from dist_llm.engines.base import DataParallelRank
from dist_llm.models.decoder import Decoder
from dist_llm.models.router_stats import RouterStats
from dist_llm.objectives.batch import Batch
from dist_llm.optim.loss_scale import LossScale
from dist_llm.parallel.mesh import all_gather_ints, number_to_tensor
from dist_llm.parallel.replica_check import ReplicaGroups
from dist_llm.sharded import is_sharded


class DataParallelEngine:
    """The methods of the interface `engines/base.py:Engine` that data-parallel engines share.

    A process group must exist.
    """

    loss_scale: LossScale | None = None
    model: Decoder

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.router_stats: dict[int, RouterStats] = {}  # `check` refuses a mixture of experts

    @property
    def model_parts(self) -> list[Decoder]:
        return [self.model]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, buffer) of the model."""
        return self.model.named_buffers()

    @property
    def replica_groups(self) -> ReplicaGroups:
        """One group with all parameters, or an empty list if FSDP or ZeRO stage 3 shards the parameters."""
        parameters = dict(self.named_parameters())
        if any(is_sharded(parameter) for parameter in parameters.values()):
            return []
        return [(self.replica_process_group, parameters)]

    @property
    def replica_process_group(self) -> dist.ProcessGroup | None:
        """The process group of the ranks with equal parameters. None is the group of all ranks."""
        return None

    @property
    def dp_rank_and_size(self) -> DataParallelRank:
        return DataParallelRank(dist.get_rank(), dist.get_world_size())

    @property
    def coordinates(self) -> tuple[int, ...]:
        """The coordinates (pp, dp_replicate, dp_shard, cp) of this rank in the corresponding native mesh."""
        return 0, 0, dist.get_rank(), 0

    def all_reduce_over_dp_and_cp(self, value: Tensor | float) -> Tensor:
        total = value.clone() if isinstance(value, Tensor) else number_to_tensor(value, self.device)
        dist.all_reduce(total)
        return total

    def all_gather_ints(self, value: int) -> list[int]:
        return all_gather_ints(value, self.device)

    def to_local_batch(self, batch: Batch) -> Batch:
        return batch.to(self.device)

    def seed_dropout(self, step: int, microbatch: int) -> None:
        """Seed dropout as the native engine does on a rank with the same coordinates."""
        if self.config.model.dropout:
            # The native engine adds the tp coordinate, which is 0 here, if sequence_parallel is set.
            tp_coordinate = (0,) if self.config.parallel.sequence_parallel else ()
            torch.manual_seed(hash_seed(self.config.run.seed, step, microbatch, *self.coordinates, *tp_coordinate))
