"""One training example as arrays, and the collation of examples to a batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.models.attention_mask import AttentionMask, EncoderInput
from dist_llm.objectives.batch import Batch

Ints = npt.NDArray[np.int64]
PADDING_DOCUMENT = -1  # document id of padding


@dataclass(frozen=True)
class TokenWindow:
    """The tokens of one sample. Without `segment_ids_W` they are one stream in which documents follow one another.

    Document ids come from the corpus's document offsets, never from separator tokens: a corpus may have no separators,
    and a separator may begin a document as well as end one.
    """

    tokens_W: npt.NDArray[Any]
    segment_ids_W: Ints | None = None  # packed segment of each token; segments are independent
    loss_mask_W: npt.NDArray[np.bool_] | None = None  # the tokens with a loss; None: all
    document_ids_W: Ints | None = None  # document of each token of a stream; None: no mask needs it

    def document_ids(self) -> Ints:
        """Return the document or segment of each token, [W], from 0; zeros if no mask needs them."""
        ids_W = self.document_ids_W if self.segment_ids_W is None else self.segment_ids_W
        return np.zeros(len(self.tokens_W), np.int64) if ids_W is None else ids_W


@dataclass(frozen=True)
class Example:
    """Inputs and targets of one sample and the document of each input; for an encoder-decoder also the encoder's
    input."""

    inputs_S: Ints
    targets_S: Ints
    documents_S: Ints
    prefix: int = 0  # leading inputs that attend to each other in both directions
    encoder_T: Ints | None = None
    encoder_documents_T: Ints | None = None

    def pad(self, length: int, encoder_len: int, filler: int) -> "Example":
        """Append `filler` tokens, which have no loss, up to the lengths that all examples share."""
        return replace(
            self,
            inputs_S=pad_to(self.inputs_S, length, filler),
            targets_S=pad_to(self.targets_S, length, IGNORE),
            # Attention needs at least one key per query. So in a single stack the padding forms its own document, which
            # attends to itself and which no other token attends to.
            documents_S=pad_to(self.documents_S, length, int(self.documents_S[-1]) + (self.encoder_T is None)),
            encoder_T=_pad_optional(self.encoder_T, encoder_len, filler),
            encoder_documents_T=_pad_optional(self.encoder_documents_T, encoder_len, PADDING_DOCUMENT),
        )


@dataclass(frozen=True)
class BatchLayout:
    """The contents that all batches of a run share. They never change during a run, so nothing is recompiled."""

    causal: bool
    prefix: bool  # some examples have a bidirectional prefix
    document_mask: bool  # tokens attend to their own document only
    encoder_padding: bool  # encoder inputs may be shorter than their length in the batch
    sample_hashes: bool = False  # stochastic depth needs a hash of each sample
    token_windows: bool = False  # windows are TokenWindow objects, of any length or with a loss mask


def pad_to(values: Ints, length: int, filler: int) -> Ints:
    """Append `filler` to `values` up to `length`."""
    return np.concatenate((values, np.full(length - len(values), filler, dtype=np.int64)))


def _pad_optional(values: Ints | None, length: int, filler: int) -> Ints | None:
    return None if values is None else pad_to(values, length, filler)


def document_positions(documents_BS: Ints) -> Ints:
    """Return the position of each token within its document, [B, S], from 0. A document's tokens need not be
    adjacent."""
    positions = np.empty_like(documents_BS)
    for row, out in zip(documents_BS, positions, strict=True):
        order = np.argsort(row, kind="stable")
        ordered = row[order]
        starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        out[order] = np.arange(len(row)) - np.repeat(starts, np.diff(np.append(starts, len(row))))
    return positions


def collate(examples: Sequence[Example], layout: BatchLayout, sample_hash_B: Tensor | None) -> Batch:
    """Collate examples of equal lengths to a batch."""
    inputs = np.stack([example.inputs_S for example in examples])
    targets = np.stack([example.targets_S for example in examples])
    mask, positions = AttentionMask(layout.causal), None
    if layout.prefix:
        mask = replace(mask, prefix_B=torch.tensor([example.prefix for example in examples]))
    if layout.document_mask:
        documents = np.stack([example.documents_S for example in examples])
        mask = replace(mask, documents_BT=torch.from_numpy(documents))
        positions = torch.from_numpy(document_positions(documents))
    num_valid_tokens = int((targets != IGNORE).sum())
    ids = torch.from_numpy(inputs), torch.from_numpy(targets)
    encoder_input = _collate_encoder_input(examples, layout)
    return Batch(*ids, mask, num_valid_tokens, positions, encoder_input, sample_hash_B)


def _collate_encoder_input(examples: Sequence[Example], layout: BatchLayout) -> EncoderInput | None:
    tokens = [example.encoder_T for example in examples if example.encoder_T is not None]
    documents = [example.encoder_documents_T for example in examples if example.encoder_documents_T is not None]
    if not tokens:
        return None
    mask, positions, documents_BT = AttentionMask(causal=False), None, np.stack(documents)
    if layout.document_mask:
        positions = torch.from_numpy(document_positions(documents_BT))
    elif layout.encoder_padding:
        documents_BT = np.minimum(documents_BT, 0)  # one document for all text, and one for padding
    if layout.document_mask or layout.encoder_padding:
        mask = replace(mask, documents_BT=torch.from_numpy(documents_BT))
    return EncoderInput(torch.from_numpy(np.stack(tokens)), mask, positions)
