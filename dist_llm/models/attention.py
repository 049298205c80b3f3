"""Grouped-query attention, and the choice of the attention kernel."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dist_llm.compat import disable_current_modes
from dist_llm.config.model_section import ModelConfig
from dist_llm.config.parametrization import resolve_attention_scale
from dist_llm.models.attention_mask import AttentionMask
from dist_llm.models.cost import Cost
from dist_llm.models.init import block_matrix_init
from dist_llm.models.layer_context import LayerContext
from dist_llm.models.mixer import Mixer
from dist_llm.models.norm import RMSNorm
from dist_llm.models.rope import apply_rotary
from dist_llm.param_spec import ParamSpec, linear_specs, norm_specs

# Shape suffixes: B batch, S queries, T keys, D d_model, H query heads, K key-value heads, E head_dim.

MIN_BLOCK = 32  # queries of a block in `banded_attention`, so that narrow windows do not make tiny products


class Attention(Mixer):
    """Grouped-query self-attention (Ainslie et al. 2023). `mask` says which keys each query attends to."""

    supports_context_parallel = True

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.head_dim = config.head_dim
        bias = config.bias or config.qkv_bias
        self.normalizes_each_head = config.qk_norm is True
        self.q = nn.Linear(config.d_model, config.n_heads * config.head_dim, bias=bias)
        self.k = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=bias)
        self.v = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=bias)
        self.norm_q = self.norm_k = None
        if config.qk_norm:
            num_heads = (1, 1) if self.normalizes_each_head else (config.n_heads, config.n_kv_heads)
            self.norm_q, self.norm_k = (
                RMSNorm(num * config.head_dim, config.norm_eps, config.norm_weight) for num in num_heads
            )
        self.kernel = AttentionKernel(config.dropout, resolve_attention_scale(config), config.attention_cap)
        self.out = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=config.bias or config.out_bias)

    def forward(self, x_BSD: Tensor, context: LayerContext) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        q_BSHE = self._project_queries(x_BSD)
        k_BSKE, v_BSKE = self._project_keys_and_values(x_BSD)
        if context.rotation is not None:
            q_BSHE, k_BSKE = apply_rotary(q_BSHE, *context.rotation), apply_rotary(k_BSKE, *context.rotation)
        if context.cache is not None:
            k_BSKE, v_BSKE = context.cache.append(self.layer, k_BSKE, v_BSKE, self.config.window)
        return self.out(self.kernel(q_BSHE, k_BSKE, v_BSKE, context.mask).flatten(-2))

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        """Return the cost of the four projections and of the scores."""
        weights = 2 * config.d_model * config.head_dim * (config.n_heads + config.n_kv_heads)
        return Cost(weights, config.n_heads * config.head_dim, config.window)

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the parameters: the projections are sharded by heads."""
        config, layer = self.config, self.layer
        return {
            **linear_specs(
                "q", self.q, ("heads", "embed"), block_matrix_init(config, layer, self.q, role="query_or_key")
            ),
            **linear_specs(
                "k", self.k, ("kv_heads", "embed"), block_matrix_init(config, layer, self.k, role="query_or_key")
            ),
            **linear_specs("v", self.v, ("kv_heads", "embed"), block_matrix_init(config, layer, self.v, role="input")),
            **norm_specs("norm_q", self.norm_q, self._norm_dim("heads"), by_head=self.normalizes_each_head),
            **norm_specs("norm_k", self.norm_k, self._norm_dim("kv_heads"), by_head=self.normalizes_each_head),
            **linear_specs(
                "out", self.out, ("embed", "heads"), block_matrix_init(config, layer, self.out, role="residual_output")
            ),
        }

    def _project_queries(self, x_BSD: Tensor) -> Tensor:
        return self._split_heads(self.q(x_BSD), self.norm_q)

    def _project_keys_and_values(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return self._split_heads(self.k(x_BTD), self.norm_k), self._split_heads(self.v(x_BTD), None)

    def _split_heads(self, x_BSD: Tensor, norm: nn.Module | None) -> Tensor:
        """Split queries, keys or values into heads, [B, S, H, E], and normalize them."""
        if norm is not None and not self.normalizes_each_head:
            x_BSD = norm(x_BSD)
        # -1 instead of n_heads, because a tensor-parallel rank has only some of the heads.
        x_BSHE = x_BSD.unflatten(-1, (-1, self.head_dim))
        return norm(x_BSHE) if norm is not None and self.normalizes_each_head else x_BSHE

    def _norm_dim(self, heads: str) -> str:
        return "head_dim" if self.normalizes_each_head else heads


class CrossAttention(Attention):
    """Attention of the decoder tokens to the encoder output (the memory), without positional encoding."""

    def forward(  # type: ignore[override]
        self, x_BSD: Tensor, memory_BTD: Tensor, context: LayerContext
    ) -> Tensor:
        """Decoder activations [B, S, D] and encoder output [B, T, D] -> [B, S, D]."""
        cache = context.cache
        if cache is not None and self.layer in cache.memory:
            k_BTKE, v_BTKE = cache.memory[self.layer]
        else:
            k_BTKE, v_BTKE = self._project_keys_and_values(memory_BTD)
        if cache is not None:
            cache.memory[self.layer] = (k_BTKE, v_BTKE)
        return self.out(self.kernel(self._project_queries(x_BSD), k_BTKE, v_BTKE, context.memory_mask).flatten(-2))


class AttentionKernel(nn.Module):
    """Softmax attention without projections. It is a module, so that context parallelism can replace it."""

    def __init__(self, dropout: float, scale: float, cap: float | None = None) -> None:
        super().__init__()
        self.dropout, self.scale, self.cap = dropout, scale, cap

    def forward(self, q_BSHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: AttentionMask) -> Tensor:
        """Queries [B, S, H, E], keys and values [B, T, K, E] -> [B, S, H, E]."""
        dropout = self.dropout if self.training else 0.0
        return scaled_dot_product(q_BSHE, k_BTKE, v_BTKE, mask, dropout, self.scale, self.cap)


def materialize_mask(
    mask: AttentionMask,
    shape: tuple[int, int, int],
    device: torch.device,
    dense: bool,
    bias_HST: Tensor | None = None,
    allow_bands: bool = True,
) -> AttentionMask:
    """Return `mask` with `mask.materialized` in the form that the attention kernel needs, for all layers.

    `shape` is (B, S, T). `materialized` stays None if `mask.causal` alone describes the mask: this is the fast path of
    the kernels. It also stays None if `banded_attention` computes the mask, which `allow_bands` permits. On a GPU it
    becomes a FlexAttention block mask, which skips masked blocks. On a CPU, with `dense`, or with a bias it becomes a
    boolean mask [B, 1, S, T] or the bias with -inf at masked positions, [B, H, S, T].
    """
    B, S, T = shape
    if mask.window >= T:
        mask = replace(mask, window=0)
    if mask.is_trivial and bias_HST is None:
        return mask
    if allow_bands and bias_HST is None and device.type == "cpu" and can_use_bands(mask, S, T):
        return mask
    if device.type == "cuda" and bias_HST is None and not dense:
        block_mask = create_block_mask(lambda b, h, q, k: mask.allows(S, T, b, q, k), B, None, S, T, device=device)
        return replace(mask, materialized=block_mask)
    b, q, k = (torch.arange(size, device=device) for size in (B, S, T))
    allowed_BST = mask.allows(S, T, b[:, None, None], q[None, :, None], k).expand(B, S, T)
    if bias_HST is None:
        return replace(mask, materialized=allowed_BST[:, None])
    return replace(mask, materialized=bias_HST.masked_fill(~allowed_BST[:, None], -torch.inf))


def scaled_dot_product(
    q_BSHE: Tensor,
    k_BTKE: Tensor,
    v_BTKE: Tensor,
    mask: AttentionMask,
    dropout: float,
    scale: float | None = None,
    cap: float | None = None,
) -> Tensor:
    """Softmax attention, [B, S, H, E]. If S < T, the queries are the last S of the T tokens.

    `mask` comes from `materialize_mask`. `scale` multiplies the products of queries and keys; None: 1 / sqrt(E). `cap`
    limits the scores.
    """
    S, T = q_BSHE.shape[1], k_BTKE.shape[1]
    q, k, v = q_BSHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2)
    if cap is not None:
        return _capped_attention(q, k, v, mask, dropout, scale or q.shape[-1] ** -0.5, cap).transpose(1, 2)
    if mask.window and mask.materialized is None:
        return banded_attention(q, k, v, mask, dropout, scale).transpose(1, 2)
    enable_gqa = q_BSHE.shape[2] != k_BTKE.shape[2]
    materialized = mask.materialized
    if isinstance(materialized, BlockMask):
        flex = _compiled_flex_attention()
        return flex(q, k, v, block_mask=materialized, scale=scale, enable_gqa=enable_gqa).transpose(1, 2)
    if isinstance(materialized, Tensor) and materialized.is_floating_point():
        materialized = materialized.to(q.dtype)
    # A single query is the last token and attends to all keys, so it needs no mask. With S == T, `is_causal` is the
    # fast path of the kernels. Otherwise the causal mask is aligned to the last key.
    is_causal = mask.causal and materialized is None
    if is_causal and 1 < S < T:
        with disable_current_modes():  # selective checkpointing's dispatch mode rejects this tensor subclass
            materialized = causal_lower_right(S, T)
    out_BHSE = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=materialized,
        dropout_p=dropout,
        is_causal=is_causal and S == T and S > 1,
        enable_gqa=enable_gqa,
        scale=scale,
    )
    return out_BHSE.transpose(1, 2)


def _capped_attention(
    q_BHSE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask: AttentionMask, dropout: float, scale: float, cap: float
) -> Tensor:
    """Attention whose scores are cap * tanh(score / cap) (Gemma Team 2024, section 2). It stores all scores."""
    (S, T), groups = (q_BHSE.shape[2], k_BKTE.shape[2]), q_BHSE.shape[1] // k_BKTE.shape[1]
    k_BHTE, v_BHTE = k_BKTE.repeat_interleave(groups, dim=1), v_BKTE.repeat_interleave(groups, dim=1)
    scores_BHST = cap * torch.tanh(q_BHSE @ k_BHTE.transpose(-1, -2) * (scale / cap))
    materialized = mask.materialized
    if materialized is None and mask.causal:
        materialized = torch.ones(S, T, dtype=torch.bool, device=q_BHSE.device).tril(T - S)
    if materialized is not None and materialized.is_floating_point():
        scores_BHST = scores_BHST + materialized.to(scores_BHST.dtype)
    elif materialized is not None:
        scores_BHST = scores_BHST.masked_fill(~materialized, -torch.inf)
    probabilities = F.softmax(scores_BHST, dim=-1, dtype=torch.promote_types(scores_BHST.dtype, torch.float32))
    return F.dropout(probabilities.to(q_BHSE.dtype), dropout) @ v_BHTE


def can_use_bands(mask: AttentionMask, S: int, T: int) -> bool:
    """Return whether `banded_attention` computes this mask, in less time than attention with a dense mask.

    It is faster for windows of at most half of the sequence (benchmarks/window.py).
    """
    is_plain = mask.causal and mask.prefix_B is None and mask.query_positions_BS is None
    return is_plain and S == T and 0 < 2 * mask.window <= T


def banded_attention(
    q_BHSE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask: AttentionMask, dropout: float, scale: float | None
) -> Tensor:
    """Causal attention with a window, in blocks of queries that attend only to the keys of their window.

    A block of b queries needs the b + window - 1 keys up to its last query. So time and memory grow with S * window
    instead of S^2. Smaller blocks compute fewer masked scores, but store more copies of each key: about 1 + window / b.
    With a quarter of the window, these are 1.25 window scores per query and 5 copies of each key.
    """
    B, H, S, _ = q_BHSE.shape
    window = mask.window
    block = min(S, max(-(-window // 4), MIN_BLOCK))
    num_blocks = -(-S // block)
    padding = num_blocks * block - S
    span = block + window - 1  # keys of a block

    def split_keys(x_BKSE: Tensor) -> Tensor:
        """[B, K, S, E] -> [B * blocks, K, span, E]."""
        padded = F.pad(x_BKSE, (0, 0, window - 1, padding))
        return padded.unfold(2, span, block).permute(0, 2, 1, 4, 3).flatten(0, 1)

    q = F.pad(q_BHSE, (0, 0, 0, padding)).unflatten(2, (num_blocks, block)).transpose(1, 2).flatten(0, 1)
    out = F.scaled_dot_product_attention(
        q,
        split_keys(k_BKSE),
        split_keys(v_BKSE),
        attn_mask=_band_mask(mask, S, block, num_blocks, q.device).expand(B, -1, -1, -1, -1).flatten(0, 1),
        dropout_p=dropout,
        enable_gqa=k_BKSE.shape[1] != H,
        scale=scale,
    )
    return out.unflatten(0, (B, num_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :S]


def _band_mask(mask: AttentionMask, S: int, block: int, num_blocks: int, device: torch.device) -> Tensor:
    """Return which keys of its span each query of a block attends to, [1 or B, blocks, 1, block, span].

    Each padded query attends to itself, because softmax needs at least one key.
    """
    window = mask.window
    block_starts = torch.arange(num_blocks, device=device)[:, None, None] * block
    queries = block_starts + torch.arange(block, device=device)[:, None]
    keys = block_starts + torch.arange(block + window - 1, device=device) - (window - 1)
    distance = queries - keys
    allowed = (distance >= 0) & (distance < window) & (keys >= 0)
    if mask.documents_BT is None:
        return allowed[None, :, None]
    padded_BT = F.pad(mask.documents_BT, (0, num_blocks * block - S), value=-1)
    same_document = padded_BT[:, queries] == padded_BT[:, keys.clamp(min=0)]
    return (allowed & same_document)[:, :, None]


@cache
def _compiled_flex_attention() -> Any:
    """Compile FlexAttention. Without compilation it has no kernel and computes all scores, also the masked ones."""
    return torch.compile(flex_attention, dynamic=False)
