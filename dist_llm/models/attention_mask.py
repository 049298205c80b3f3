"""Attention masks and encoder inputs: data that travels with the batch."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dist_llm.compat import pytree

# B batch  S queries  T keys


@dataclass(frozen=True)
class AttentionMask:
    """Which keys each query attends to.

    A query attends to a key if both are in the same document and one of these holds: the mask is not `causal`; the key
    is not after the query; the key is in the prefix. By default the S queries are the last S of the T keys.
    `materialized` is the representation for a kernel, which `materialize_mask` computes once for all layers.
    """

    causal: bool
    prefix_B: Tensor | None = None  # number of leading keys of a row that all its queries attend to
    documents_BT: Tensor | None = None  # document of each key; padding is a document of its own, -1
    # Documents of the queries, if they differ from the keys' (cross-attention).
    query_documents_BS: Tensor | None = None
    # Positions of the queries among the keys, if not at the end (context parallelism).
    query_positions_BS: Tensor | None = None
    num_keys: int = 0  # number of keys, if not that of the queries (context parallelism)
    materialized: Any = None

    @property
    def is_trivial(self) -> bool:
        """Whether `causal` alone describes the mask."""
        return self.prefix_B is None and self.documents_BT is None

    def allows(self, S: int, T: int, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Return whether query q of S attends to key k of T in row b. Indices are broadcast against each other."""
        position = q + (T - S) if self.query_positions_BS is None else self.query_positions_BS[b, q]
        allowed = position >= k if self.causal else (q >= 0) & (k >= 0)
        if self.causal and self.prefix_B is not None:
            allowed = allowed | (k < self.prefix_B[b])
        if self.documents_BT is not None:
            if self.query_documents_BS is None:
                query_document = self.documents_BT[b, position]
            else:
                query_document = self.query_documents_BS[b, q]
            allowed = allowed & (query_document == self.documents_BT[b, k])
        return allowed

    def cross_attention_mask(self, encoder_mask: "AttentionMask", S: int) -> "AttentionMask":
        """Return the mask of S decoder queries over the encoder's tokens: all of the same document, or of document 0
        without documents."""
        if encoder_mask.documents_BT is None:
            return FULL
        query_documents_BS = self.documents_BT
        if query_documents_BS is None:
            query_documents_BS = encoder_mask.documents_BT.new_zeros(len(encoder_mask.documents_BT), S)
        return AttentionMask(False, documents_BT=encoder_mask.documents_BT, query_documents_BS=query_documents_BS)

    def with_query_positions(self, query_positions_BS: Tensor, num_keys: int) -> "AttentionMask":
        """Return the same mask for queries at the given positions among `num_keys` keys."""
        return replace(self, query_positions_BS=query_positions_BS, num_keys=num_keys)


CAUSAL = AttentionMask(causal=True)
FULL = AttentionMask(causal=False)


@dataclass(frozen=True)
class EncoderInput:
    """The encoder's input: T ids per row, their mask, and their positions (None: 0, 1, 2, ...)."""

    tokens_BT: Tensor
    mask: AttentionMask = FULL
    positions_BT: Tensor | None = None


# Pipeline schedules split all tensors of a batch by rows, so they must find these in the pytree.
_MASK_TENSORS = ("prefix_B", "documents_BT", "query_documents_BS", "query_positions_BS", "materialized")
pytree.register_pytree_node(
    AttentionMask,
    lambda mask: ([getattr(mask, name) for name in _MASK_TENSORS], (mask.causal, mask.num_keys)),
    lambda values, rest: AttentionMask(rest[0], num_keys=rest[1], **dict(zip(_MASK_TENSORS, values, strict=True))),
    serialized_type_name="dist_llm.models.attention_mask.AttentionMask",
)
pytree.register_pytree_node(
    EncoderInput,
    lambda encoder_input: ([encoder_input.tokens_BT, encoder_input.mask, encoder_input.positions_BT], None),
    lambda values, _: EncoderInput(*values),
    serialized_type_name="dist_llm.models.attention_mask.EncoderInput",
)
