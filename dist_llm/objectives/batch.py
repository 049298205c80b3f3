"""What one forward pass needs: tokens in, tokens to predict, and who sees whom."""

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

    @staticmethod
    def of(inputs_BS: Tensor, targets_BS: Tensor, visible: Visibility) -> "Batch":
        """A batch that counts its own targets (on the host: no device sync later)."""
        return Batch(inputs_BS, targets_BS, visible, int((targets_BS != IGNORE).sum()))

    def pin(self) -> "Batch":
        """Page-locked, so that `to` need not wait for the copy."""
        return replace(self, inputs_BS=self.inputs_BS.pin_memory(), targets_BS=self.targets_BS.pin_memory())

    def to(self, device: torch.device) -> "Batch":
        return replace(
            self,
            inputs_BS=self.inputs_BS.to(device, non_blocking=True),
            targets_BS=self.targets_BS.to(device, non_blocking=True),
        )
