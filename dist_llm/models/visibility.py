"""Who may look at whom, and what an encoder reads: data that travels with the batch."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

# B batch  S queries  T keys


@dataclass(frozen=True)
class Visibility:
    """Attention's mask. A query sees a key if (not `causal`, or the key is not after it, or lies in the prefix)
    and both are of one document. Queries are the last S of the T keys' places where nothing else is said.

    `mask` is what `attention.look` made of it for a kernel, once for all layers.
    """

    causal: bool
    prefix_B: Tensor | None = None  # the first so many keys of a row are seen by all of it
    documents_BT: Tensor | None = None  # the document of each key; padding is a document of its own, -1
    queries_BS: Tensor | None = None  # the documents of queries that are not among the keys (cross-attention)
    places_BS: Tensor | None = None  # where the queries stand among the keys, if not at the end (context ranks)
    keys: int = 0  # how many there are, if not as many as queries (context ranks)
    mask: Any = None

    @property
    def plain(self) -> bool:
        """Whether `causal` says it all."""
        return self.prefix_B is None and self.documents_BT is None

    def sees(self, S: int, T: int, b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether query q of S sees key k of T in row b; indices are broadcast against each other."""
        place = q + (T - S) if self.places_BS is None else self.places_BS[b, q]
        seen = place >= k if self.causal else (q >= 0) & (k >= 0)
        if self.causal and self.prefix_B is not None:
            seen = seen | (k < self.prefix_B[b])
        if self.documents_BT is not None:
            own = self.documents_BT[b, place] if self.queries_BS is None else self.queries_BS[b, q]
            seen = seen & (own == self.documents_BT[b, k])
        return seen

    def cross(self, source: "Visibility", S: int) -> "Visibility":
        """What S queries of this see of the sequence that `source` is about: all of their own document (else: 0)."""
        if source.documents_BT is None:
            return FULL
        own = self.documents_BT
        if own is None:
            own = source.documents_BT.new_zeros(len(source.documents_BT), S)
        return Visibility(causal=False, documents_BT=source.documents_BT, queries_BS=own)

    def at(self, places_BS: Tensor, keys: int) -> "Visibility":
        """The same for queries that stand at `places_BS` among `keys` keys."""
        return replace(self, places_BS=places_BS, keys=keys)


CAUSAL = Visibility(causal=True)
FULL = Visibility(causal=False)


@dataclass(frozen=True)
class Source:
    """What the encoder reads: T ids a row, who sees whom among them, and positions (None: 0, 1, 2, ...)."""

    tokens_BT: Tensor
    visible: Visibility = FULL
    positions_BT: Tensor | None = None


# Pipelines cut whatever tensors a batch holds by rows: they must be able to find them.
_FIELDS = ("prefix_B", "documents_BT", "queries_BS", "places_BS", "mask")
pytree.register_pytree_node(
    Visibility,
    lambda visible: ([getattr(visible, name) for name in _FIELDS], (visible.causal, visible.keys)),
    lambda values, rest: Visibility(rest[0], keys=rest[1], **dict(zip(_FIELDS, values, strict=True))),
    serialized_type_name="dist_llm.models.visibility.Visibility",
)
pytree.register_pytree_node(
    Source,
    lambda source: ([source.tokens_BT, source.visible, source.positions_BT], None),
    lambda values, _: Source(*values),
    serialized_type_name="dist_llm.models.visibility.Source",
)
