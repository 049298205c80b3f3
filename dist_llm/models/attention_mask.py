"""Attention masks and encoder inputs, which are part of a batch."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from dist_llm.compat import pytree

# Shape suffixes: B batch, S queries, T keys.


@dataclass(frozen=True)
class AttentionMask:
    """Says which keys each query attends to.

    A query attends to a key if both are in the same document and one of these holds: the mask is not `causal`; the key
    is not after the query; the key is in the prefix. With a `window`, the distance of both must also be less than the
    window. By default the S queries are the last S of the T keys.
    """

    causal: bool
    prefix_B: Tensor | None = None  # length of the prefix: leading keys that all queries of the row attend to
    documents_BT: Tensor | None = None  # document id of each key; None: one document
    query_documents_BS: Tensor | None = None  # for cross-attention: document id of each query
    query_positions_BS: Tensor | None = None  # for context parallelism: position of each query among the keys
    num_keys: int = 0  # for context parallelism: number of keys; 0: as many as queries
    window: int = 0  # 0: no limit of the distance
    materialized: Any = None  # the form for an attention kernel, which `materialize_mask` computes for all layers

    @property
    def is_trivial(self) -> bool:
        """Whether `causal` alone describes the mask."""
        return self.prefix_B is None and self.documents_BT is None and not self.window

    def allows(self, S: int, T: int, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Return whether query q (of S) attends to key k (of T) in row b. The indices broadcast against each other."""
        position = q + (T - S) if self.query_positions_BS is None else self.query_positions_BS[b, q]
        allowed = position >= k if self.causal else (q >= 0) & (k >= 0)
        if self.causal and self.prefix_B is not None:
            allowed = allowed | (k < self.prefix_B[b])
        if self.window:
            allowed = allowed & ((position - k).abs() < self.window)
        if self.documents_BT is not None:
            if self.query_documents_BS is None:
                query_document = self.documents_BT[b, position]
            else:
                query_document = self.query_documents_BS[b, q]
            allowed = allowed & (query_document == self.documents_BT[b, k])
        return allowed

    def build_cross_attention_mask(self, encoder_mask: "AttentionMask", S: int) -> "AttentionMask":
        """Return the mask of S decoder queries over the tokens of the encoder.

        A query attends to the encoder tokens of its own document. Without document ids, all queries are in document 0.
        """
        if encoder_mask.documents_BT is None:
            return FULL
        query_documents_BS = self.documents_BT
        if query_documents_BS is None:
            query_documents_BS = encoder_mask.documents_BT.new_zeros(len(encoder_mask.documents_BT), S)
        return AttentionMask(False, documents_BT=encoder_mask.documents_BT, query_documents_BS=query_documents_BS)

    def with_query_positions(self, query_positions_BS: Tensor, num_keys: int) -> "AttentionMask":
        """Return the same mask for queries at the given positions among `num_keys` keys."""
        return replace(self, query_positions_BS=query_positions_BS, num_keys=num_keys)

    def select_keys(self, keys: slice) -> "AttentionMask":
        """Return the same mask for these keys only. The queries are the last of them."""
        documents_BT = None if self.documents_BT is None else self.documents_BT[:, keys]
        return replace(self, documents_BT=documents_BT, query_positions_BS=None, num_keys=0)


CAUSAL = AttentionMask(causal=True)
FULL = AttentionMask(causal=False)


@dataclass(frozen=True)
class EncoderInput:
    """The input of an encoder: T token ids per row, and the mask of its self-attention."""

    tokens_BT: Tensor
    mask: AttentionMask = FULL
    positions_BT: Tensor | None = None  # None: 0, 1, 2, ...


# Register both classes as pytrees, because pipeline schedules split all tensors in the pytree of a batch by rows.
_MASK_TENSORS = ("prefix_B", "documents_BT", "query_documents_BS", "query_positions_BS", "materialized")
pytree.register_pytree_node(
    AttentionMask,
    lambda mask: ([getattr(mask, name) for name in _MASK_TENSORS], (mask.causal, mask.num_keys, mask.window)),
    lambda tensors, context: AttentionMask(
        context[0], num_keys=context[1], window=context[2], **dict(zip(_MASK_TENSORS, tensors, strict=True))
    ),
    serialized_type_name="dist_llm.models.attention_mask.AttentionMask",
)
pytree.register_pytree_node(
    EncoderInput,
    lambda encoder_input: ([encoder_input.tokens_BT, encoder_input.mask, encoder_input.positions_BT], None),
    lambda values, _: EncoderInput(*values),
    serialized_type_name="dist_llm.models.attention_mask.EncoderInput",
)
