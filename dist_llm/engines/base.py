"""What the training loop asks of whoever runs the step: a few verbs, above `backward`."""

from typing import Protocol

from torch import Tensor, nn, optim

from dist_llm.objectives.batch import Batch


class Engine(Protocol):
    """One rank's share of a model, its optimizer, and the ranks it works with."""

    @property
    def model(self) -> nn.Module: ...

    @property
    def optimizer(self) -> optim.Optimizer: ...

    @property
    def data_rank(self) -> tuple[int, int]:
        """(this rank's place among those that read different samples, how many they are)."""
        ...

    def total(self, value: Tensor | int) -> Tensor:
        """The sum of `value` over the ranks that hold different tokens."""
        ...

    def accumulate(self, batch: Batch, scored: Tensor, last: bool, seed: int) -> Tensor:
        """Add the gradient of loss(batch) / scored; return that loss, detached. `last`: none follows."""
        ...

    def update(self, lr: float) -> Tensor:
        """Clip, step, clear the gradients. Returns the global norm before clipping."""
        ...

    def score(self, batch: Batch) -> Tensor:
        """The sum of the batch's losses, without gradients or dropout."""
        ...
