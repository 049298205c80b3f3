"""Grouped-query attention, its KV cache, and the choice of the attention kernel."""

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
from dist_llm.models.attention_mask import AttentionMask
from dist_llm.models.cost import Cost
from dist_llm.models.init import block_matrix_init
from dist_llm.models.positional_encoding import apply_rotary
from dist_llm.param_spec import ParamSpec, linear_specs, norm_specs

# Shape suffixes: B batch, S queries, T keys, D d_model, H query heads, K key-value heads, E head_dim.

RotaryCosSin = tuple[Tensor, Tensor]  # cos and sin, each [S, E/2] or [B, S, E/2]


class KVCache:
    """Keys and values of each layer, for generation: of all tokens so far, and of the encoder output (the memory).

    Not a dataclass: FSDP's mixed-precision input casting copies dataclasses, so updates to the cache would be lost.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def length(self) -> int:
        return next(iter(self.layers.values()))[0].shape[1] if self.layers else 0

    def append(self, layer: int, k_BSKE: Tensor, v_BSKE: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, [B, S, K, E]. Return those of all tokens, [B, T, K, E]."""
        k_BTKE, v_BTKE = k_BSKE, v_BSKE
        if layer in self.layers:
            k_cached, v_cached = self.layers[layer]
            k_BTKE, v_BTKE = torch.cat((k_cached, k_BSKE), dim=1), torch.cat((v_cached, v_BSKE), dim=1)
        self.layers[layer] = (k_BTKE, v_BTKE)
        return k_BTKE, v_BTKE


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023). `mask` says which keys each query attends to."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.head_dim = config, layer, config.head_dim
        bias = config.bias or config.qkv_bias
        self.q = nn.Linear(config.d_model, config.n_heads * config.head_dim, bias=bias)
        self.k = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=bias)
        self.v = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=bias)
        self.norm_q = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.norm_k = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.kernel = AttentionKernel(config.dropout, config.attention_scale or config.head_dim**-0.5)
        self.out = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=config.bias)

    def forward(
        self, x_BSD: Tensor, rotation: RotaryCosSin | None, mask: AttentionMask, cache: KVCache | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        q_BSHE = self._project_queries(x_BSD)
        k_BSKE, v_BSKE = self._project_keys_and_values(x_BSD)
        if rotation is not None:
            q_BSHE, k_BSKE = apply_rotary(q_BSHE, *rotation), apply_rotary(k_BSKE, *rotation)
        if cache is not None:
            k_BSKE, v_BSKE = cache.append(self.layer, k_BSKE, v_BSKE)
        return self.out(self.kernel(q_BSHE, k_BSKE, v_BSKE, mask).flatten(-2))

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        """Return the cost of the four projections and of the scores."""
        weights = 2 * config.d_model * config.head_dim * (config.n_heads + config.n_kv_heads)
        return Cost(weights, score_width=config.n_heads * config.head_dim)

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
            **norm_specs("norm_q", self.norm_q, "head_dim", by_head=True),
            **norm_specs("norm_k", self.norm_k, "head_dim", by_head=True),
            **linear_specs(
                "out", self.out, ("embed", "heads"), block_matrix_init(config, layer, self.out, role="residual_output")
            ),
        }

    def _project_queries(self, x_BSD: Tensor) -> Tensor:
        # -1 instead of n_heads, because a tensor-parallel rank has only some of the heads.
        q_BSHE = self.q(x_BSD).unflatten(-1, (-1, self.head_dim))
        return q_BSHE if self.norm_q is None else self.norm_q(q_BSHE)

    def _project_keys_and_values(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        k_BTKE = self.k(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTKE = self.v(x_BTD).unflatten(-1, (-1, self.head_dim))
        return k_BTKE if self.norm_k is None else self.norm_k(k_BTKE), v_BTKE


class CrossAttention(Attention):
    """Attention of the decoder tokens to the encoder output (the memory), without positional encoding."""

    def forward(  # type: ignore[override]
        self, x_BSD: Tensor, memory_BTD: Tensor, mask: AttentionMask, cache: KVCache | None = None
    ) -> Tensor:
        """Decoder activations [B, S, D] and encoder output [B, T, D] -> [B, S, D]."""
        if cache is not None and self.layer in cache.memory:
            k_BTKE, v_BTKE = cache.memory[self.layer]
        else:
            k_BTKE, v_BTKE = self._project_keys_and_values(memory_BTD)
        if cache is not None:
            cache.memory[self.layer] = (k_BTKE, v_BTKE)
        return self.out(self.kernel(self._project_queries(x_BSD), k_BTKE, v_BTKE, mask).flatten(-2))


class AttentionKernel(nn.Module):
    """Softmax attention without projections. It is a module, so that context parallelism can replace it."""

    def __init__(self, dropout: float, scale: float) -> None:
        super().__init__()
        self.dropout, self.scale = dropout, scale

    def forward(self, q_BSHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: AttentionMask) -> Tensor:
        """Queries [B, S, H, E], keys and values [B, T, K, E] -> [B, S, H, E]."""
        return scaled_dot_product(q_BSHE, k_BTKE, v_BTKE, mask, self.dropout if self.training else 0.0, self.scale)


def materialize_mask(
    mask: AttentionMask,
    shape: tuple[int, int, int],
    device: torch.device,
    dense: bool,
    bias_HST: Tensor | None = None,
) -> AttentionMask:
    """Return `mask` with `mask.materialized` in the form that the attention kernel needs, for all layers.

    `shape` is (B, S, T). `materialized` stays None if `mask.causal` alone describes the mask: this is the fast path of
    the kernels. On a GPU it becomes a FlexAttention block mask, which skips masked blocks. On a CPU, with `dense`, or
    with a bias it becomes a boolean mask [B, 1, S, T] or the bias with -inf at masked positions, [B, H, S, T].
    """
    if mask.is_trivial and bias_HST is None:
        return mask
    B, S, T = shape
    if device.type == "cuda" and bias_HST is None and not dense:
        block_mask = create_block_mask(lambda b, h, q, k: mask.allows(S, T, b, q, k), B, None, S, T, device=device)
        return replace(mask, materialized=block_mask)
    b, q, k = (torch.arange(size, device=device) for size in (B, S, T))
    allowed_BST = mask.allows(S, T, b[:, None, None], q[None, :, None], k).expand(B, S, T)
    if bias_HST is None:
        return replace(mask, materialized=allowed_BST[:, None])
    return replace(mask, materialized=bias_HST.masked_fill(~allowed_BST[:, None], -torch.inf))


def scaled_dot_product(
    q_BSHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: AttentionMask, dropout: float, scale: float | None = None
) -> Tensor:
    """Softmax attention, [B, S, H, E]. If S < T, the queries are the last S of the T tokens.

    `mask` comes from `materialize_mask`. `scale` multiplies the products of queries and keys; None: 1 / sqrt(E).
    """
    S, T = q_BSHE.shape[1], k_BTKE.shape[1]
    q, k, v = q_BSHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2)
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


@cache
def _compiled_flex_attention() -> Any:
    """Compile FlexAttention. Without compilation it has no kernel and computes all scores, also the masked ones."""
    return torch.compile(flex_attention, dynamic=False)
