"""One training example as arrays, and the collation of examples to a batch.

Shape suffixes: B samples, W tokens of a window, S inputs of an example, T tokens of an encoder input.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.models.attention_mask import AttentionMask, EncoderInput
from dist_llm.objectives.batch import Batch

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Values = TypeVar("Values", Ints, Floats)
PADDING_DOCUMENT = -1  # document id of padding in an encoder input


@dataclass(frozen=True)
class TokenWindow:
    """The tokens of one sample, before the objective makes inputs and targets of them.

    Document ids come from the document offsets of the corpus, not from end-of-document tokens: a corpus may have no
    such tokens, or they may begin documents.
    """

    tokens_W: npt.NDArray[Any]
    segment_ids_W: Ints | None = None  # packed segment of each token; None: the window is consecutive text
    loss_weights_W: Floats | None = None  # factor of the loss of each token as a target; None: 1
    document_ids_W: Ints | None = None  # document of each token of consecutive text; None: no mask needs it

    def get_document_ids(self) -> Ints:
        """Return the segment or document of each token, [W], counted from 0; zeros if no mask needs them."""
        ids_W = self.document_ids_W if self.segment_ids_W is None else self.segment_ids_W
        return np.zeros(len(self.tokens_W), np.int64) if ids_W is None else ids_W


@dataclass(frozen=True)
class Example:
    """The inputs and targets of one sample."""

    inputs_S: Ints
    targets_S: Ints
    documents_S: Ints  # document id of each input
    prefix_len: int = 0  # number of leading inputs that attend to each other in both directions
    encoder_T: Ints | None = None  # input of the encoder; None: there is no encoder
    encoder_documents_T: Ints | None = None  # document id of each token of the encoder
    loss_weights_S: Floats | None = None  # factor of the loss of each target; None: 1

    def pad(self, inputs_len: int, encoder_len: int, filler: int) -> "Example":
        """Append `filler` tokens, which have no loss, up to the lengths that all examples share."""
        # Attention needs at least one key per query. In a single stack, padding is therefore a document of its own: it
        # attends to itself, and no other token attends to it. In a decoder with an encoder, padding continues the last
        # document, so that cross-attention has a key.
        padding_document = int(self.documents_S[-1]) + (self.encoder_T is None)
        return replace(
            self,
            inputs_S=pad_to(self.inputs_S, inputs_len, filler),
            targets_S=pad_to(self.targets_S, inputs_len, IGNORE_INDEX),
            loss_weights_S=_pad_optional(self.loss_weights_S, inputs_len, 0),
            documents_S=pad_to(self.documents_S, inputs_len, padding_document),
            encoder_T=_pad_optional(self.encoder_T, encoder_len, filler),
            encoder_documents_T=_pad_optional(self.encoder_documents_T, encoder_len, PADDING_DOCUMENT),
        )


@dataclass(frozen=True)
class BatchLayout:
    """The contents of a batch. They are the same for all batches of a run, so the model is compiled only once."""

    causal: bool  # causal attention
    has_prefix: bool  # examples may have a bidirectional prefix
    has_document_mask: bool  # tokens attend only to tokens of their own document
    has_encoder_padding: bool  # encoder inputs may be padded
    has_sample_hashes: bool = False  # stochastic depth needs a hash of each sample
    has_loss_weights: bool = False  # the losses of targets have different weights
    uses_token_windows: bool = False  # windows are TokenWindow objects: they vary in length, or have loss weights


def pad_to(values: Values, length: int, filler: int) -> Values:
    """Append `filler` to `values` up to `length`."""
    return np.concatenate((values, np.full(length - len(values), filler, dtype=values.dtype)))


def _pad_optional(values: Values | None, length: int, filler: int) -> Values | None:
    return None if values is None else pad_to(values, length, filler)


def compute_document_positions(documents_BS: Ints) -> Ints:
    """Return the position of each token within its document, [B, S], counted from 0.

    The tokens of a document need not be adjacent.
    """
    positions_BS = np.empty_like(documents_BS)
    for documents, positions in zip(documents_BS, positions_BS, strict=True):
        order = np.argsort(documents, kind="stable")
        sorted_documents = documents[order]
        starts = np.flatnonzero(np.concatenate(([True], sorted_documents[1:] != sorted_documents[:-1])))
        document_lens = np.diff(np.append(starts, len(documents)))
        positions[order] = np.arange(len(documents)) - np.repeat(starts, document_lens)
    return positions_BS


def collate(examples: Sequence[Example], layout: BatchLayout, sample_hash_B: Tensor | None) -> Batch:
    """Stack padded examples to a batch."""
    inputs = np.stack([example.inputs_S for example in examples])
    targets = np.stack([example.targets_S for example in examples])
    mask, positions = AttentionMask(layout.causal), None
    if layout.has_prefix:
        mask = replace(mask, prefix_B=torch.tensor([example.prefix_len for example in examples]))
    if layout.has_document_mask:
        documents = np.stack([example.documents_S for example in examples])
        mask = replace(mask, documents_BT=torch.from_numpy(documents))
        positions = torch.from_numpy(compute_document_positions(documents))
    num_valid_tokens = int((targets != IGNORE_INDEX).sum())
    batch = Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        mask,
        num_valid_tokens,
        positions_BS=positions,
        encoder_input=_collate_encoder_input(examples, layout),
        sample_hash_B=sample_hash_B,
    )
    if not layout.has_loss_weights:
        return batch
    ones_S = np.ones(inputs.shape[1])
    weights = np.stack([ones_S if example.loss_weights_S is None else example.loss_weights_S for example in examples])
    return batch.with_loss_weights(torch.from_numpy(weights).to(torch.get_default_dtype()))


def _collate_encoder_input(examples: Sequence[Example], layout: BatchLayout) -> EncoderInput | None:
    tokens = [example.encoder_T for example in examples if example.encoder_T is not None]
    documents = [example.encoder_documents_T for example in examples if example.encoder_documents_T is not None]
    if not tokens:
        return None
    mask, positions, documents_BT = AttentionMask(causal=False), None, np.stack(documents)
    if layout.has_document_mask:
        positions = torch.from_numpy(compute_document_positions(documents_BT))
    elif layout.has_encoder_padding:
        documents_BT = np.minimum(documents_BT, 0)  # one document for all text, and one for padding
    if layout.has_document_mask or layout.has_encoder_padding:
        mask = replace(mask, documents_BT=torch.from_numpy(documents_BT))
    return EncoderInput(torch.from_numpy(np.stack(tokens)), mask, positions)
