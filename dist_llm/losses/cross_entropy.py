"""Cross-entropy as a SUM over scored targets: the one division, by the world's count, is the step's."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # a target that is not scored (torch's own default)


@dataclass(frozen=True)
class CrossEntropy:
    """-log softmax(logits)[target], summed; in fp32 whatever the logits' type.

    `label_smoothing` spreads that share of the target evenly over the vocabulary (Szegedy et al.
    2016); `z_loss` adds z_loss * log(Z)^2 per scored target (Chowdhery et al. 2022, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __call__(self, logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
        """Logits [..., V] and targets [...] -> the sum over targets that are not IGNORE, a scalar."""
        logits_NV = logits_BSV.flatten(0, -2)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        targets_N = targets_BS.flatten()
        loss = F.cross_entropy(
            logits_NV, targets_N, ignore_index=IGNORE, reduction="sum", label_smoothing=self.label_smoothing
        )
        if self.z_loss:
            log_z_N = torch.logsumexp(logits_NV, dim=-1)
            loss = loss + self.z_loss * (log_z_N.square() * (targets_N != IGNORE)).sum()
        return loss
