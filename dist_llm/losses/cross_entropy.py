"""Cross-entropy as a SUM per sequence: the one division, by the world's count of scored targets, is the step's."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that is not scored (torch's own default)


@dataclass(frozen=True)
class CrossEntropy:
    """-log softmax(logits)[target], summed per sequence; in fp32 whatever the logits' type.

    `label_smoothing` spreads that share of the target evenly over the vocabulary (Szegedy et al.
    2016); `z_loss` adds z_loss * log(Z)^2 per scored target (Chowdhery et al. 2022, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __call__(self, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
        """Logits [..., S, V] and targets [..., S] -> sums over the targets that are not IGNORE, [...]."""
        logits_NV = logits_BSV.flatten(0, -2)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        targets_N = targets_BS.flatten()
        loss_N = F.cross_entropy(
            logits_NV, targets_N, ignore_index=IGNORE, reduction="none", label_smoothing=self.label_smoothing
        )
        if self.z_loss:
            log_z_N = torch.logsumexp(logits_NV, dim=-1)
            loss_N = loss_N + self.z_loss * log_z_N.square() * (targets_N != IGNORE)
        return loss_N.view(targets_BS.shape).sum(-1)
