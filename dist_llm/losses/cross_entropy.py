"""Cross-entropy as a SUM per sequence. The training step divides once, by the world's number of valid tokens."""

from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target without a loss (torch's default value)
MAX_MICROBATCHES = 1 << 16


class LossTerms:
    """The terms of a training loss: sums over valid targets, [2] per microbatch, of the cross-entropy and the z-loss.

    The remainder of the loss is label smoothing. Layers with a regularized loss add their terms here, without
    gradients.
    """

    def __init__(self) -> None:
        self._sums: deque[Tensor] = deque(maxlen=MAX_MICROBATCHES)

    def add(self, sums_2: Tensor) -> None:
        self._sums.append(sums_2.detach())

    def pop_latest(self, microbatches: int) -> Tensor | None:
        """Return the sums over the latest microbatches, [2], and clear all. Older ones come from a trial forward."""
        newest = list(self._sums)[-microbatches:]
        self._sums.clear()
        return torch.stack(newest).sum(0) if newest else None


@dataclass(frozen=True)
class CrossEntropy:
    """-log softmax(logits)[target], summed per sequence, in fp32 for all logit types.

    `label_smoothing` spreads that fraction of the target evenly over the vocabulary (Szegedy et al. 2016). `z_loss`
    adds z_loss * log(Z)^2 per valid target (Chowdhery et al. 2022, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether this is the plain cross-entropy that evaluation uses."""
        return not self.label_smoothing and not self.z_loss

    def __call__(self, logits_BSV: Tensor, targets_BS: Tensor, terms: LossTerms | None = None) -> Tensor:
        """Logits [..., S, V] and targets [..., S] -> sums over the targets that are not IGNORE, [...].

        The terms of the sums are added to `terms`.
        """
        logits_NV = logits_BSV.flatten(0, -2)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        targets_N = targets_BS.flatten()
        loss_N = F.cross_entropy(
            logits_NV, targets_N, ignore_index=IGNORE, reduction="none", label_smoothing=self.label_smoothing
        )
        z_loss_N = torch.zeros_like(loss_N)
        if self.z_loss:
            log_z_N = torch.logsumexp(logits_NV, dim=-1)
            z_loss_N = self.z_loss * log_z_N.square() * (targets_N != IGNORE)
            loss_N = loss_N + z_loss_N
        if terms is not None:
            with torch.no_grad():
                plain = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")
                terms.add(torch.stack((plain, z_loss_N.sum())))
        return loss_N.view(targets_BS.shape).sum(-1)
