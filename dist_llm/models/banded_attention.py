"""Attention with sliding windows on a CPU, in blocks of queries that attend only to the keys of their window.

Shape suffixes: B batch, S queries, T keys, H query heads, K key-value heads, E head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_llm.models.attention_mask import AttentionMask
from dist_llm.models.softmax_attention import softmax_attention

MIN_BLOCK = 32  # queries of a block, so that narrow windows do not make tiny products


def can_use_bands(mask: AttentionMask, S: int, T: int) -> bool:
    """Return whether `banded_attention` computes this mask, in less time than attention with a dense mask.

    It is faster for windows of at most half of the sequence (benchmarks/window.py). Under context parallelism it is
    called once for each chunk of a rank, with the keys up to the last query, and is faster for each window.
    """
    if not mask.causal or mask.prefix_B is not None:
        return False
    is_context_parallel = mask.query_positions_BS is not None
    return 0 < mask.window < T if is_context_parallel else S == T and 0 < 2 * mask.window <= T


def banded_attention(
    q_BHSE: Tensor,
    k_BKTE: Tensor,
    v_BKTE: Tensor,
    mask: AttentionMask,
    dropout: float,
    scale: float | None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Causal attention with a window, in blocks of queries that attend only to the keys of their window.

    The queries are the last S of the T tokens. `mask.documents_BT` has the documents of the T tokens.

    A block of b queries needs the b + window - 1 keys up to its last query. So time and memory grow with S * window
    instead of S^2. Smaller blocks compute fewer masked scores, but store more copies of each key: about 1 + window / b.
    With a quarter of the window, these are 1.25 window scores per query and 5 copies of each key.
    """
    assert mask.query_positions_BS is None  # context parallelism attends chunk by chunk
    B, _, S, _ = q_BHSE.shape
    T = k_BKTE.shape[2]
    window = min(mask.window, T)
    num_blocks = -(-S // max(-(-window // 4), MIN_BLOCK))
    block = -(-S // num_blocks)
    padding = num_blocks * block - S
    span = block + window - 1  # keys of a block

    def split_keys(x_BKTE: Tensor) -> Tensor:
        """[B, K, T, E] -> [B * blocks, K, span, E]."""
        # The padding before the first key is negative if the window of the first query does not reach this key.
        padded = F.pad(x_BKTE, (0, 0, window - 1 - (T - S), padding))
        return padded.unfold(2, span, block).permute(0, 2, 1, 4, 3).flatten(0, 1)

    q = F.pad(q_BHSE, (0, 0, 0, padding)).unflatten(2, (num_blocks, block)).transpose(1, 2).flatten(0, 1)
    band_mask = _band_mask(mask, T - S, window, block, num_blocks, padding, q.device)
    band_mask = band_mask.expand(B, -1, -1, -1, -1).flatten(0, 1)
    out = softmax_attention(q, split_keys(k_BKTE), split_keys(v_BKTE), band_mask, dropout, False, scale, sinks_H)
    return out.unflatten(0, (B, num_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :S]


def _band_mask(
    mask: AttentionMask, offset: int, window: int, block: int, num_blocks: int, padding: int, device: torch.device
) -> Tensor:
    """Return which keys of its span each query of a block attends to, [1 or B, blocks, 1, block, span].

    The first query is key number `offset`. Each padded query attends to itself, because softmax needs at least one key.
    """
    block_starts = offset + torch.arange(num_blocks, device=device)[:, None, None] * block
    queries = block_starts + torch.arange(block, device=device)[:, None]
    keys = block_starts + torch.arange(block + window - 1, device=device) - (window - 1)
    distance = queries - keys
    allowed = (distance >= 0) & (distance < window) & (keys >= 0)
    if mask.documents_BT is None:
        return allowed[None, :, None]
    padded_BT = F.pad(mask.documents_BT, (0, padding), value=-1)
    same_document = padded_BT[:, queries] == padded_BT[:, keys.clamp(min=0)]
    return (allowed & same_document)[:, :, None]
