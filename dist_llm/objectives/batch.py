"""A batch: the tensors of one microbatch, which a forward pass takes.

Shape suffixes: B sequences, S tokens of a sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dist_llm.compat import pytree
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.attention_mask import AttentionMask, EncoderInput


@dataclass(frozen=True)
class Batch:
    """The inputs and targets of B sequences of S tokens.

    A target of IGNORE_INDEX has no loss; `num_valid_tokens` counts the other targets. The losses of targets are
    multiplied by `loss_weights_BS`, and their weighted mean is the loss. Ids may have the narrow dtype of the corpus
    (uint16 or uint32) until `to` converts them to int64.
    """

    inputs_BS: Tensor
    targets_BS: Tensor
    mask: AttentionMask
    num_valid_tokens: int
    positions_BS: Tensor | None = None  # None: 0, 1, 2, ...
    encoder_input: EncoderInput | None = None  # only for an encoder-decoder
    sample_hash_B: Tensor | None = None  # hash of (seed, sample id): the random bits of stochastic depth
    sample_ids_B: Tensor | None = None  # sample id of each row, for the sample audit; stays on the host
    source_ids_B: Tensor | None = None  # index of the corpus of each row, if there are several corpora
    loss_weights_BS: Tensor | None = None  # factor of the loss of each target; 0 where the target has no loss
    loss_weight_sum: float | None = None  # sum of `loss_weights_BS`, known on the host; None: all weights are 1

    @staticmethod
    def build(inputs_BS: Tensor, targets_BS: Tensor, mask: AttentionMask) -> "Batch":
        """Build a batch. Count its valid tokens now, on the host, so that training needs no device sync for it."""
        return Batch(inputs_BS, targets_BS, mask, count_valid_tokens(targets_BS))

    @property
    def loss_denominator(self) -> float:
        """The number by which the sum of the losses is divided: of valid tokens, or the sum of their weights."""
        return self.num_valid_tokens if self.loss_weight_sum is None else self.loss_weight_sum

    def with_loss_weights(self, loss_weights_BS: Tensor) -> "Batch":
        """Return a copy with the weights of targets with a loss. They must be on the host, where they are summed."""
        weights_BS = loss_weights_BS * (self.targets_BS != IGNORE_INDEX)
        return replace(self, loss_weights_BS=weights_BS, loss_weight_sum=float(weights_BS.double().sum()))

    def forward_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for the forward of a model."""
        arguments = {
            "targets_BS": self.targets_BS,
            "mask": self.mask,
            "positions_BS": self.positions_BS,
            "sample_hash_B": self.sample_hash_B,
            "loss_weights_BS": self.loss_weights_BS,
        }
        return arguments if self.encoder_input is None else arguments | {"encoder_input": self.encoder_input}

    @staticmethod
    def concatenate(batches: Sequence["Batch"]) -> "Batch":
        """Concatenate the rows of all batches to one batch."""
        flattened = [pytree.tree_flatten(dict(vars(batch))) for batch in batches]
        values_of_field = zip(*(leaves for leaves, _ in flattened), strict=True)
        leaves = [torch.cat(values) if isinstance(values[0], Tensor) else values[0] for values in values_of_field]
        tree_spec = flattened[0][1]
        full_batch = Batch(**pytree.tree_unflatten(leaves, tree_spec))
        weight_sums = [batch.loss_weight_sum for batch in batches if batch.loss_weight_sum is not None]
        return replace(
            full_batch,
            num_valid_tokens=sum(batch.num_valid_tokens for batch in batches),
            loss_weight_sum=sum(weight_sums) if weight_sums else None,
        )

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, so that `to` does not block."""
        return self._map_tensors(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """Copy to the device, and convert ids to int64 there: narrow ids are faster to transfer."""
        return self._map_tensors(lambda tensor: _widen_ids(tensor.to(device, non_blocking=True)))

    def _map_tensors(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply `function` to all tensors except `sample_ids_B`, which stays on the host."""
        fields = pytree.tree_map_only(Tensor, function, {**vars(self), "sample_ids_B": None})
        return Batch(**{**fields, "sample_ids_B": self.sample_ids_B})


def _widen_ids(tensor: Tensor) -> Tensor:
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32) else tensor


def count_valid_tokens(targets_BS: Tensor) -> int:
    """Count the targets that are not IGNORE_INDEX."""
    return int((targets_BS != IGNORE_INDEX).sum())
