"""One sample as arrays, and samples stacked to a batch."""

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
PADDING = -1  # the document of what is no text


@dataclass(frozen=True)
class Text:
    """What one sample reads; without `pieces_W` one stream, in which documents follow one another.

    Document numbers come from the corpus's document offsets, never from separators among the tokens: a corpus may have
    no separators, and a separator may begin a document as well as end one.
    """

    tokens_W: npt.NDArray[Any]
    pieces_W: Ints | None = None  # the number of each token's piece: pieces have nothing to do with each other
    scored_W: npt.NDArray[np.bool_] | None = None  # the tokens to be predicted; None: all
    documents_W: Ints | None = None  # of a stream: the number of each token's document; None: no mask needs it

    def documents(self) -> Ints:
        """The number of each token's document, or piece, from 0; all 0 where no mask needs them."""
        found = self.documents_W if self.pieces_W is None else self.pieces_W
        return np.zeros(len(self.tokens_W), np.int64) if found is None else found


@dataclass(frozen=True)
class Row:
    """Inputs and targets of one sample, the document of each input, and the same of what an encoder reads."""

    inputs_S: Ints
    targets_S: Ints
    documents_S: Ints
    prefix: int = 0  # inputs at the start that all see each other
    source_T: Ints | None = None
    source_documents_T: Ints | None = None

    def padded(self, length: int, source: int, filler: int) -> "Row":
        """As long as all others: `filler` at the ends, which is not scored."""
        return replace(
            self,
            inputs_S=pad(self.inputs_S, length, filler),
            targets_S=pad(self.targets_S, length, IGNORE),
            # No row of attention without a key to see: what pads one stack sees itself, and nothing sees it.
            documents_S=pad(self.documents_S, length, int(self.documents_S[-1]) + (self.source_T is None)),
            source_T=None if self.source_T is None else pad(self.source_T, source, filler),
            source_documents_T=(
                None if self.source_documents_T is None else pad(self.source_documents_T, source, PADDING)
            ),
        )


@dataclass(frozen=True)
class Form:
    """What the batches of a run have, the same in all of them so that nothing is compiled again."""

    causal: bool
    prefix: bool  # some rows begin with inputs that see each other
    documents: bool  # tokens see their own document alone
    source_padding: bool  # what the encoder reads may be shorter than its place
    draws: bool = False  # stochastic depth wants a number for each sample
    texts: bool = False  # samples are of any length, or not scored throughout


def pad(values: Ints, length: int, filler: int) -> Ints:
    return np.concatenate((values, np.full(length - len(values), filler, dtype=np.int64)))


def positions_of(documents_BS: Ints) -> Ints:
    """The place of each token within its document, from 0; a document's tokens need not be neighbours."""
    positions = np.empty_like(documents_BS)
    for row, out in zip(documents_BS, positions, strict=True):
        order = np.argsort(row, kind="stable")
        ordered = row[order]
        firsts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        out[order] = np.arange(len(row)) - np.repeat(firsts, np.diff(np.append(firsts, len(row))))
    return positions


def stack(rows: Sequence[Row], form: Form, sample_hash_B: Tensor | None) -> Batch:
    """Rows of equal lengths as one batch."""
    inputs = np.stack([row.inputs_S for row in rows])
    targets = np.stack([row.targets_S for row in rows])
    mask, positions = AttentionMask(form.causal), None
    if form.prefix:
        mask = replace(mask, prefix_B=torch.tensor([row.prefix for row in rows]))
    if form.documents:
        documents = np.stack([row.documents_S for row in rows])
        mask = replace(mask, documents_BT=torch.from_numpy(documents))
        positions = torch.from_numpy(positions_of(documents))
    scored = int((targets != IGNORE).sum())
    ids = torch.from_numpy(inputs), torch.from_numpy(targets)
    return Batch(*ids, mask, scored, positions, _source(rows, form), sample_hash_B)


def _source(rows: Sequence[Row], form: Form) -> EncoderInput | None:
    tokens = [row.source_T for row in rows if row.source_T is not None]
    documents = [row.source_documents_T for row in rows if row.source_documents_T is not None]
    if not tokens:
        return None
    mask, positions, documents_BT = AttentionMask(causal=False), None, np.stack(documents)
    if form.documents:
        positions = torch.from_numpy(positions_of(documents_BT))
    elif form.source_padding:
        documents_BT = np.minimum(documents_BT, 0)  # one document, and padding
    if form.documents or form.source_padding:
        mask = replace(mask, documents_BT=torch.from_numpy(documents_BT))
    return EncoderInput(torch.from_numpy(np.stack(tokens)), mask, positions)
