"""Cross-entropy as a SUM per sequence: the one division, by the world's count of scored targets, is the step's."""

from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that is not scored (torch's own default)
MOST_MICROBATCHES = 1 << 16


class LossTerms:
    """What a training loss is made of: sums over scored targets, [2] per microbatch: cross-entropy and z-loss.

    What label smoothing adds is the rest. Layers with a regularised loss add to it, without a gradient.
    """

    def __init__(self) -> None:
        self._sums: deque[Tensor] = deque(maxlen=MOST_MICROBATCHES)

    def add(self, sums_2: Tensor) -> None:
        self._sums.append(sums_2.detach())

    def take(self, microbatches: int) -> Tensor | None:
        """The sums of the newest microbatches, [2]; older ones are dropped: a layout may try out a forward first."""
        newest = list(self._sums)[-microbatches:]
        self._sums.clear()
        return torch.stack(newest).sum(0) if newest else None


@dataclass(frozen=True)
class CrossEntropy:
    """-log softmax(logits)[target], summed per sequence; in fp32 whatever the logits' type.

    `label_smoothing` spreads that share of the target evenly over the vocabulary (Szegedy et al.
    2016); `z_loss` adds z_loss * log(Z)^2 per scored target (Chowdhery et al. 2022, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether it is the cross-entropy alone, as evaluation takes it."""
        return not self.label_smoothing and not self.z_loss

    def __call__(self, logits_BSV: Tensor, targets_BS: Tensor, terms: LossTerms | None = None) -> Tensor:
        """Logits [..., S, V] and targets [..., S] -> sums over the targets that are not IGNORE, [...].

        What the sums are made of is added to `terms`.
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
