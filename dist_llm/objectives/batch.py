"""What one forward pass needs: tokens in, tokens to predict, and who sees whom."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.models.attention_mask import AttentionMask, EncoderInput


@dataclass(frozen=True)
class Batch:
    """B sequences of S tokens; a target of IGNORE is not scored. `scored` counts the others.

    Ids that are read and not made may have the corpus's own narrow type until `to` widens them.
    """

    inputs_BS: Tensor
    targets_BS: Tensor
    mask: AttentionMask
    scored: int
    positions_BS: Tensor | None = None  # None: 0, 1, 2, ...
    encoder_input: EncoderInput | None = None  # what the encoder of an encoder-decoder reads
    sample_hash_B: Tensor | None = None  # a hash of (seed, sample number): stochastic depth draws from it
    samples_B: Tensor | None = None  # the sample number of each row, for those who audit the order; stays on the host
    sources_B: Tensor | None = None  # the corpus that each row is of, where there are several

    @staticmethod
    def of(inputs_BS: Tensor, targets_BS: Tensor, mask: AttentionMask) -> "Batch":
        """A batch that counts its own targets (on the host: no device sync later)."""
        return Batch(inputs_BS, targets_BS, mask, count_scored(targets_BS))

    def arguments(self) -> dict[str, Any]:
        """What a model's forward takes beside the ids, by name."""
        found = {
            "targets_BS": self.targets_BS,
            "mask": self.mask,
            "positions_BS": self.positions_BS,
            "sample_hash_B": self.sample_hash_B,
        }
        return found if self.encoder_input is None else found | {"encoder_input": self.encoder_input}

    @staticmethod
    def joined(batches: Sequence["Batch"]) -> "Batch":
        """All rows in one batch."""
        fields = [pytree.tree_flatten(dict(vars(batch))) for batch in batches]
        columns = zip(*(values for values, _ in fields), strict=True)
        values = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
        whole = Batch(**pytree.tree_unflatten(values, fields[0][1]))
        return replace(whole, scored=sum(batch.scored for batch in batches))

    def pin(self) -> "Batch":
        """Page-locked, so that `to` need not wait for the copy."""
        return self._map(Tensor.pin_memory)

    def to(self, device: torch.device) -> "Batch":
        """On the device, and int64 there: a quarter of the bytes is copied."""
        return self._map(lambda tensor: _wide(tensor.to(device, non_blocking=True)))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        fields = pytree.tree_map_only(Tensor, function, {**vars(self), "samples_B": None})
        return Batch(**{**fields, "samples_B": self.samples_B})


def _wide(tensor: Tensor) -> Tensor:
    return tensor.long() if tensor.dtype in (torch.uint16, torch.uint32) else tensor


def count_scored(targets_BS: Tensor) -> int:
    """How many targets are not IGNORE."""
    return int((targets_BS != IGNORE).sum())
