"""Cross-entropy, summed per sequence. The training step divides it once, by the number of valid tokens of all ranks.

Shape suffixes: B sequences, S tokens, V vocabulary, N = all tokens of the batch.
"""

from collections import deque
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # a target without a loss; the default `ignore_index` of torch
MAX_MICROBATCHES = 1 << 16  # limits the memory if nobody reads the terms


class LossTerms:
    """Collects the terms of a regularized training loss, for logging.

    Each microbatch adds (cross-entropy, z-loss), summed over its valid targets, without gradients. The remainder of the
    loss is label smoothing.
    """

    def __init__(self) -> None:
        self._sums: deque[Tensor] = deque(maxlen=MAX_MICROBATCHES)

    def add(self, sums_2: Tensor) -> None:
        self._sums.append(sums_2.detach())

    def pop_latest(self, num_microbatches: int) -> Tensor | None:
        """Return the sum of the terms of the latest microbatches, [2], and clear all terms.

        Older terms come from a trial forward.
        """
        latest = list(self._sums)[-num_microbatches:]
        self._sums.clear()
        return torch.stack(latest).sum(0) if latest else None


@dataclass(frozen=True)
class CrossEntropy:
    """-log softmax(logits)[target], summed per sequence, computed at least in fp32.

    `label_smoothing` is the fraction of the target that is spread evenly over the vocabulary (Szegedy et al. 2016).
    `z_loss` adds z_loss * log(Z)^2 per valid target (Chowdhery et al. 2022, section 5).
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def is_unregularized(self) -> bool:
        """Whether the loss has neither label smoothing nor z-loss, as in evaluation."""
        return not self.label_smoothing and not self.z_loss

    def __call__(
        self,
        logits_BSV: Tensor,
        targets_BS: Tensor,
        terms: LossTerms | None = None,
        loss_weights_BS: Tensor | None = None,
    ) -> Tensor:
        """Logits [..., S, V] and targets [..., S] -> losses [...], summed over the targets that are not IGNORE_INDEX.

        The loss of each target is multiplied by its weight in `loss_weights_BS`. The terms of the losses are added to
        `terms`.
        """
        logits_NV = logits_BSV.flatten(0, -2)
        logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        targets_N = targets_BS.flatten()
        loss_N = F.cross_entropy(
            logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=self.label_smoothing
        )
        z_loss_N = torch.zeros_like(loss_N)
        if self.z_loss:
            log_z_N = torch.logsumexp(logits_NV, dim=-1)
            z_loss_N = self.z_loss * log_z_N.square() * (targets_N != IGNORE_INDEX)
            loss_N = loss_N + z_loss_N
        weights_N = 1.0 if loss_weights_BS is None else loss_weights_BS.flatten()
        loss_N, z_loss_N = loss_N * weights_N, z_loss_N * weights_N
        if terms is not None:
            with torch.no_grad():
                cross_entropy_N = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="none")
                terms.add(torch.stack(((cross_entropy_N * weights_N).sum(), z_loss_N.sum())))
        return loss_N.view(targets_BS.shape).sum(-1)
