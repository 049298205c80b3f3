"""What one forward pass needs: tokens in, tokens to predict, and who sees whom."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.models.visibility import Visibility


@dataclass(frozen=True)
class Batch:
    """B sequences of S tokens; a target of IGNORE is not scored. `scored` counts the others."""

    inputs_BS: Tensor
    targets_BS: Tensor
    visible: Visibility
    scored: int
    positions_BS: Tensor | None = None  # None: 0, 1, 2, ...

    @staticmethod
    def of(inputs_BS: Tensor, targets_BS: Tensor, visible: Visibility) -> "Batch":
        """A batch that counts its own targets (on the host: no device sync later)."""
        return Batch(inputs_BS, targets_BS, visible, count_scored(targets_BS))

    def pin(self) -> "Batch":
        """Page-locked, so that `to` need not wait for the copy."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        positions_BS = None if self.positions_BS is None else function(self.positions_BS)
        return replace(
            self, inputs_BS=function(self.inputs_BS), targets_BS=function(self.targets_BS), positions_BS=positions_BS
        )


def count_scored(targets_BS: Tensor) -> int:
    """How many targets are not IGNORE."""
    return int((targets_BS != IGNORE).sum())
