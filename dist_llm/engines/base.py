"""The engine interface: the operations that the training loop needs from whatever runs the step."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dist_llm.checkpoint.checkpoint_state import CheckpointState
from dist_llm.models.decoder import Decoder
from dist_llm.objectives.batch import Batch
from dist_llm.optim.loss_scale import LossScale
from dist_llm.parallel.replica_check import ReplicaGroups


class Engine(Protocol):
    """One rank's part of a model, its optimizer, and the communication with other ranks.

    The interface lies above `backward`, because a pipeline schedule runs the backwards itself and takes all
    microbatches at once.
    """

    device: torch.device
    loss_scale: LossScale | None  # None unless the engine scales fp16 losses itself

    @property
    def model_parts(self) -> Sequence[Decoder]:
        """This rank's parts of the model: one, or its pipeline stages."""
        ...

    @property
    def state(self) -> CheckpointState:
        """Weights and optimizer state, for checkpoints."""
        ...

    @property
    def dp_rank_and_size(self) -> tuple[int, int]:
        """(this rank's index among the ranks that read different samples, their number)."""
        ...

    @property
    def replicated_params(self) -> ReplicaGroups:
        """Parameters that other ranks also hold, bit for bit, by process group."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return this rank's parameters, with their names in the full model."""
        ...

    def all_reduce_over_data(self, value: Tensor | int) -> Tensor:
        """Sum `value` over the ranks whose losses cover different tokens. Return the sum on every rank."""
        ...

    def all_gather_ints(self, value: int) -> list[int]:
        """Return the value of every rank, by rank."""
        ...

    def to_local_batch(self, batch: Batch) -> Batch:
        """Return this rank's part of `batch` on its device: all tokens, or its chunks of each sequence."""
        ...

    def accumulate(self, batches: Sequence[Batch], num_valid_tokens: Tensor, step: int) -> Tensor:
        """Accumulate the gradient of sum(losses) / num_valid_tokens over the microbatches.

        Return this rank's losses / num_valid_tokens per sequence, [B], detached. Gradients must be clear before the
        call. `step` seeds dropout.
        """
        ...

    def update(self, lr: float, should_apply: Callable[[Tensor], bool] | None = None) -> Tensor:
        """Clip, step and clear the gradients. Return the global gradient norm before clipping, [].

        If `should_apply(norm)` is false, the gradients are cleared and nothing else happens. DeepSpeed's partitioned
        optimizers ignore it: they skip steps with a non-finite norm and no others.
        """
        ...

    def score(self, batch: Batch) -> Tensor:
        """Return this rank's sum of losses of each sequence, [B], without gradients and dropout."""
        ...
