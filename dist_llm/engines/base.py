"""The engine interface: the operations of a training step that the trainer needs.

The native engine, DeepSpeed and accelerate implement this interface; `build_engine` selects one.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dist_llm.checkpoint.checkpoint_state import CheckpointState
from dist_llm.models.decoder import Decoder
from dist_llm.models.router_stats import RouterStats
from dist_llm.objectives.batch import Batch
from dist_llm.optim.loss_scale import LossScale
from dist_llm.parallel.replica_check import ReplicaGroups


class DataParallelRank(NamedTuple):
    """A data-parallel rank and the number of data-parallel ranks."""

    rank: int
    size: int


class Engine(Protocol):
    """The part of a model on one rank, its optimizer, and the communication with other ranks.

    `accumulate` includes the backward pass of all microbatches, because a pipeline schedule interleaves the forward and
    backward passes of microbatches itself.
    """

    device: torch.device
    loss_scale: LossScale | None  # None unless the engine scales fp16 losses itself
    router_stats: dict[int, RouterStats]  # of the last step, by layer; empty without a mixture of experts

    @property
    def model_parts(self) -> Sequence[Decoder]:
        """The parts of the model on this rank: one, or one per pipeline stage of this rank."""
        ...

    @property
    def state(self) -> CheckpointState:
        """Weights and optimizer state, for checkpoints."""
        ...

    @property
    def dp_rank_and_size(self) -> DataParallelRank:
        """The data-parallel rank of this process, and the number of data-parallel ranks.

        Processes with the same data-parallel rank read the same samples.
        """
        ...

    @property
    def replica_groups(self) -> ReplicaGroups:
        """The parameters that are replicated, by process group: all ranks of a group hold bitwise equal tensors.

        The list is empty if no parameter of this rank is replicated.
        """
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters on this rank, with their names in the full model."""
        ...

    def all_reduce_over_loss_axes(self, value: Tensor | float) -> Tensor:
        """Sum `value` over the ranks that compute the losses of different tokens. Every rank gets the sum.

        These are the data-parallel and context-parallel ranks of the last pipeline stage.
        """
        ...

    def all_gather_ints(self, value: int) -> list[int]:
        """Return the values of all ranks, by rank."""
        ...

    def to_local_batch(self, batch: Batch) -> Batch:
        """Move the part of `batch` that this rank computes to its device.

        Under context parallelism this part is some chunks of each sequence, otherwise the full batch.
        """
        ...

    def accumulate(self, batches: Sequence[Batch], denominator: Tensor, step: int) -> Tensor:
        """Accumulate the gradient of sum(losses) / denominator over the microbatches. The denominator is above 0.

        Return, for each sequence of this rank, its loss divided by the denominator: [B], detached. Gradients must be
        zero or None before the call. `step` seeds dropout.
        """
        ...

    def update(self, lr: float, should_apply: Callable[[Tensor], bool] | None = None) -> Tensor:
        """Clip the gradients, take the optimizer step, clear the gradients. Return the norm before clipping (a scalar).

        If `should_apply(norm)` is false, the gradients are only cleared. The partitioned optimizers of DeepSpeed ignore
        `should_apply`: they skip exactly the steps with a non-finite norm.
        """
        ...

    def score(self, batch: Batch) -> Tensor:
        """Return the sum of losses of each sequence on this rank, [B], without gradients and dropout."""
        ...
