"""The batch: the input of one forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dist_llm.compat import pytree
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.models.attention_mask import AttentionMask, EncoderInput


@dataclass(frozen=True)
class Batch:
    """B sequences of S tokens. A target of IGNORE has no loss; `num_valid_tokens` counts the others.

    Ids read from a corpus may have its narrow dtype until `to` converts them to int64.
    """

    inputs_BS: Tensor
    targets_BS: Tensor
    mask: AttentionMask
    num_valid_tokens: int
    positions_BS: Tensor | None = None  # None: 0, 1, 2, ...
    encoder_input: EncoderInput | None = None  # only for an encoder-decoder
    sample_hash_B: Tensor | None = None  # a hash of (seed, sample id), the random bits of stochastic depth
    sample_ids_B: Tensor | None = None  # the sample id of each row, for the sample audit; stays on the host
    source_ids_B: Tensor | None = None  # the corpus of each row, if there are several

    @staticmethod
    def of(inputs_BS: Tensor, targets_BS: Tensor, mask: AttentionMask) -> "Batch":
        """Build a batch and count its valid tokens on the host, so that no device sync is needed later."""
        return Batch(inputs_BS, targets_BS, mask, count_valid_tokens(targets_BS))

    def forward_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of a model's forward."""
        arguments = {
            "targets_BS": self.targets_BS,
            "mask": self.mask,
            "positions_BS": self.positions_BS,
            "sample_hash_B": self.sample_hash_B,
        }
        return arguments if self.encoder_input is None else arguments | {"encoder_input": self.encoder_input}

    @staticmethod
    def concatenate(batches: Sequence["Batch"]) -> "Batch":
        """Concatenate the rows of all batches to one batch."""
        fields = [pytree.tree_flatten(dict(vars(batch))) for batch in batches]
        columns = zip(*(values for values, _ in fields), strict=True)
        values = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
        full_batch = Batch(**pytree.tree_unflatten(values, fields[0][1]))
        return replace(full_batch, num_valid_tokens=sum(batch.num_valid_tokens for batch in batches))

    def pin_memory(self) -> "Batch":
        """Copy to page-locked memory, so that `to` does not block."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """Copy to the device and convert ids to int64 there. Narrow ids need a quarter of the transfer."""
        return self._map(lambda tensor: _widen(tensor.to(device, non_blocking=True)))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        fields = pytree.tree_map_only(Tensor, function, {**vars(self), "sample_ids_B": None})
        return Batch(**{**fields, "sample_ids_B": self.sample_ids_B})


def _widen(tensor: Tensor) -> Tensor:
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32) else tensor


def count_valid_tokens(targets_BS: Tensor) -> int:
    """Count the targets that are not IGNORE."""
    return int((targets_BS != IGNORE).sum())
