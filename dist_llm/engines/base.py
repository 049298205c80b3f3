"""What the training loop asks of whoever runs the step: a few verbs, above `backward`."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dist_llm.checkpoint.state import State
from dist_llm.models.decoder import Decoder
from dist_llm.objectives.batch import Batch
from dist_llm.optim.loss_scale import LossScale
from dist_llm.parallel.replica_check import ReplicaGroups


class Engine(Protocol):
    """One rank's share of a model, its optimizer, and the ranks it works with.

    The cut lies above `backward`: pipeline schedules own it, and take all microbatches at once.
    """

    device: torch.device
    loss_scale: LossScale | None  # of fp16, where the engine keeps one

    @property
    def model_parts(self) -> Sequence[Decoder]:
        """This rank's parts of the model: one, or its stages of a pipeline."""
        ...

    @property
    def state(self) -> State:
        """Weights and moments, for checkpoints."""
        ...

    @property
    def dp_rank_and_size(self) -> tuple[int, int]:
        """(this rank's place among those that read different samples, how many they are)."""
        ...

    @property
    def replicated_params(self) -> ReplicaGroups:
        """What other ranks should hold bit for bit, too."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """All of this rank's parameters under their names in the whole model."""
        ...

    def all_reduce_over_data(self, value: Tensor | int) -> Tensor:
        """The sum of `value` over the ranks that score different tokens; on every rank."""
        ...

    def all_gather_ints(self, value: int) -> list[int]:
        """The value of every rank, in their order. Waits for them all."""
        ...

    def to_local_batch(self, batch: Batch) -> Batch:
        """The tokens of `batch` that this rank works on, on its device: all, or its part of each sequence."""
        ...

    def accumulate(self, batches: Sequence[Batch], num_valid_tokens: Tensor, step: int) -> Tensor:
        """Make the gradient of the sum of losses / scored; return this rank's share of that by sequence, detached.

        Gradients are clear before. `step` seeds dropout.
        """
        ...

    def update(self, lr: float, should_apply: Callable[[Tensor], bool] | None = None) -> Tensor:
        """Clip, step, clear the gradients. Returns the global norm before clipping.

        Where `accept`, asked with the norm, says no, gradients are cleared and nothing else. DeepSpeed's partitioned
        optimizers are not asked: they leave out steps whose norm is not finite, and no other.
        """
        ...

    def score(self, batch: Batch) -> Tensor:
        """This rank's share of the losses' sum of each sequence, [B], without gradients or dropout."""
        ...
