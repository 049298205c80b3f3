"""Who may look at whom, and what an encoder reads: data that travels with the batch."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

# B batch  S queries  T keys


@dataclass(frozen=True)
class AttentionMask:
    """Attention's mask. A query sees a key if (not `causal`, or the key is not after it, or lies in the prefix)
    and both are of one document. Queries are the last S of the T keys' places where nothing else is said.

    `mask` is what `attention.look` made of it for a kernel, once for all layers.
    """

    causal: bool
    prefix_B: Tensor | None = None  # the first so many keys of a row are seen by all of it
    documents_BT: Tensor | None = None  # the document of each key; padding is a document of its own, -1
    query_documents_BS: Tensor | None = None  # the documents of queries that are not among the keys (cross-attention)
    query_positions_BS: Tensor | None = (
        None  # where the queries stand among the keys, if not at the end (context ranks)
    )
    num_keys: int = 0  # how many there are, if not as many as queries (context ranks)
    materialized: Any = None

    @property
    def is_trivial(self) -> bool:
        """Whether `causal` says it all."""
        return self.prefix_B is None and self.documents_BT is None

    def allows(self, S: int, T: int, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q of S sees key k of T in row b; indices are broadcast against each other."""
        place = q + (T - S) if self.query_positions_BS is None else self.query_positions_BS[b, q]
        seen = place >= k if self.causal else (q >= 0) & (k >= 0)
        if self.causal and self.prefix_B is not None:
            seen = seen | (k < self.prefix_B[b])
        if self.documents_BT is not None:
            own = self.documents_BT[b, place] if self.query_documents_BS is None else self.query_documents_BS[b, q]
            seen = seen & (own == self.documents_BT[b, k])
        return seen

    def cross_attention_mask(self, encoder_input: "AttentionMask", S: int) -> "AttentionMask":
        """What S queries of this see of the sequence that `source` is about: all of their own document (else: 0)."""
        if encoder_input.documents_BT is None:
            return FULL
        own = self.documents_BT
        if own is None:
            own = encoder_input.documents_BT.new_zeros(len(encoder_input.documents_BT), S)
        return AttentionMask(causal=False, documents_BT=encoder_input.documents_BT, query_documents_BS=own)

    def with_query_positions(self, query_positions_BS: Tensor, num_keys: int) -> "AttentionMask":
        """The same for queries that stand at `places_BS` among `keys` keys."""
        return replace(self, query_positions_BS=query_positions_BS, num_keys=num_keys)


CAUSAL = AttentionMask(causal=True)
FULL = AttentionMask(causal=False)


@dataclass(frozen=True)
class EncoderInput:
    """What the encoder reads: T ids a row, who sees whom among them, and positions (None: 0, 1, 2, ...)."""

    tokens_BT: Tensor
    mask: AttentionMask = FULL
    positions_BT: Tensor | None = None


# Pipelines cut whatever tensors a batch holds by rows: they must be able to find them.
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
