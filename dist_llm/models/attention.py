"""Grouped-query attention, and the choice of the attention kernel."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from dist_llm.compat import disable_current_modes
from dist_llm.config.model_section import ModelConfig
from dist_llm.config.parametrization import resolve_attention_scale
from dist_llm.models.attention_mask import AttentionMask
from dist_llm.models.banded_attention import banded_attention, can_use_bands
from dist_llm.models.cost import Cost
from dist_llm.models.init import block_matrix_init
from dist_llm.models.layer_context import LayerContext
from dist_llm.models.mixer import Mixer
from dist_llm.models.norm import RMSNorm
from dist_llm.models.rope import apply_rotary
from dist_llm.models.softmax_attention import causal_mask, dense_attention, softmax_attention
from dist_llm.param_spec import ZEROS, ParamSpec, linear_specs, norm_specs
from dist_llm.sharded import to_local

# Shape suffixes: B batch, S queries, T keys, D d_model, H query heads, K key-value heads, E head_dim.


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
        num_gates = _count_gates(config)
        self.gate = nn.Linear(config.d_model, num_gates, bias=bias) if num_gates else None
        self.sinks = nn.Parameter(torch.empty(config.n_heads)) if config.attention_sinks else None
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
        return self._attend(x_BSD, q_BSHE, k_BSKE, v_BSKE, context.mask)

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        """Return the cost of the projections and of the scores."""
        weights = 2 * config.d_model * config.head_dim * (config.n_heads + config.n_kv_heads)
        return Cost(weights + config.d_model * _count_gates(config), config.n_heads * config.head_dim, config.window)

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the parameters: the projections, the gates and the sinks are sharded by heads."""
        config, layer = self.config, self.layer
        optional_specs: dict[str, ParamSpec] = {}
        if self.sinks is not None:
            optional_specs["sinks"] = ParamSpec(("head_index",), ZEROS, decay=False)
        if self.gate is not None:
            dim = "head_index" if config.output_gate == "per_head" else "heads"
            gate_init = block_matrix_init(config, layer, self.gate, role="input")
            optional_specs |= linear_specs("gate", self.gate, (dim, "embed"), gate_init)
        return {
            **optional_specs,
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

    def _attend(self, x_BSD: Tensor, q_BSHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: AttentionMask) -> Tensor:
        """Return the output of the layer, [B, S, D]. `x_BSD` is its input."""
        sinks_H = None if self.sinks is None else to_local(self.sinks)
        out_BSHE = self.kernel(q_BSHE, k_BTKE, v_BTKE, mask, sinks_H)
        if self.gate is not None:
            out_BSHE = self._apply_gate(out_BSHE, self.gate(x_BSD))
        return self.out(out_BSHE.flatten(-2))

    def _apply_gate(self, out_BSHE: Tensor, gate_BSG: Tensor) -> Tensor:
        """Multiply the output of each head by its gate, or its dimensions by their gates (Qiu et al. 2025)."""
        return out_BSHE * torch.sigmoid(gate_BSG.unflatten(-1, (out_BSHE.shape[2], -1)))

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


def _count_gates(config: ModelConfig) -> int:
    """Return the number of output gates of a token."""
    return {"off": 0, "per_head": config.n_heads, "elementwise": config.n_heads * config.head_dim}[config.output_gate]


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
        return self._attend(x_BSD, self._project_queries(x_BSD), k_BTKE, v_BTKE, context.memory_mask)


class AttentionKernel(nn.Module):
    """Softmax attention without projections. It is a module, so that context parallelism can replace it."""

    def __init__(self, dropout: float, scale: float, cap: float | None = None) -> None:
        super().__init__()
        self.dropout, self.scale, self.cap = dropout, scale, cap

    def forward(
        self, q_BSHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, mask: AttentionMask, sinks_H: Tensor | None = None
    ) -> Tensor:
        """Queries [B, S, H, E], keys and values [B, T, K, E], sinks [H] -> [B, S, H, E]."""
        dropout = self.dropout if self.training else 0.0
        return scaled_dot_product(q_BSHE, k_BTKE, v_BTKE, mask, dropout, self.scale, self.cap, sinks_H)


def materialize_mask(
    mask: AttentionMask,
    shape: tuple[int, int, int],
    device: torch.device,
    dense: bool,
    bias_HST: Tensor | None = None,
    allow_bands: bool = True,
    has_sinks: bool = False,
) -> AttentionMask:
    """Return `mask` with `mask.materialized` in the form that the attention kernel needs, for all layers.

    `shape` is (B, S, T). `materialized` stays None if `mask.causal` alone describes the mask: this is the fast path of
    the kernels. It also stays None if `banded_attention` computes the mask, which `allow_bands` permits. On a GPU it
    becomes a FlexAttention block mask, which skips masked blocks; with sinks also if `mask.causal` describes the mask.
    On a CPU, with `dense`, or with a bias it becomes a boolean mask [B, 1, S, T] or the bias with -inf at masked
    positions, [B, H, S, T].
    """
    B, S, T = shape
    if mask.window >= T:
        mask = replace(mask, window=0)
    can_use_flex = device.type == "cuda" and bias_HST is None and not dense
    # In generation, T grows with each token, and FlexAttention would be compiled for each T.
    needs_flex = has_sinks and can_use_flex and (S == T or mask.num_keys > 0)
    if mask.is_trivial and bias_HST is None and not needs_flex:
        return mask
    if allow_bands and bias_HST is None and device.type == "cpu" and can_use_bands(mask, S, T):
        return mask
    if can_use_flex:
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
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention, [B, S, H, E]. If S < T, the queries are the last S of the T tokens.

    `mask` comes from `materialize_mask`. `scale` multiplies the products of queries and keys; None: 1 / sqrt(E). `cap`
    limits the scores. `sinks_H` are the attention sinks (softmax_attention.py).
    """
    S, T = q_BSHE.shape[1], k_BTKE.shape[1]
    q, k, v = q_BSHE.transpose(1, 2), k_BTKE.transpose(1, 2), v_BTKE.transpose(1, 2)
    materialized = mask.materialized
    # A single query is the last token and attends to all keys, so it needs no mask. With S == T, `is_causal` is the
    # fast path of the kernels. Otherwise the causal mask is aligned to the last key.
    is_causal = mask.causal and materialized is None and S > 1
    if cap is not None:
        materialized = causal_mask(S, T, q.device) if is_causal else materialized
        return dense_attention(q, k, v, materialized, dropout, scale, cap, sinks_H).transpose(1, 2)
    if mask.window and materialized is None:
        return banded_attention(q, k, v, mask, dropout, scale, sinks_H).transpose(1, 2)
    if isinstance(materialized, BlockMask):
        return _flex_attention(q, k, v, materialized, scale, sinks_H).transpose(1, 2)
    if isinstance(materialized, Tensor) and materialized.is_floating_point():
        materialized = materialized.to(q.dtype)
    if is_causal and S < T and sinks_H is not None:
        materialized = causal_mask(S, T, q.device)
    elif is_causal and S < T:
        with disable_current_modes():  # selective checkpointing's dispatch mode rejects this tensor subclass
            materialized = causal_lower_right(S, T)
    return softmax_attention(q, k, v, materialized, dropout, is_causal and S == T, scale, sinks_H).transpose(1, 2)


def _flex_attention(
    q_BHSE: Tensor, k_BKTE: Tensor, v_BKTE: Tensor, mask: BlockMask, scale: float | None, sinks_H: Tensor | None
) -> Tensor:
    """Attention with a block mask. Sinks multiply the output by exp(lse) / (exp(lse) + exp(sink))."""
    flex, enable_gqa = _compiled_flex_attention(), q_BHSE.shape[1] != k_BKTE.shape[1]
    if sinks_H is None:
        out_BHSE: Tensor = flex(q_BHSE, k_BKTE, v_BKTE, block_mask=mask, scale=scale, enable_gqa=enable_gqa)
        return out_BHSE
    out_BHSE, aux = flex(
        q_BHSE, k_BKTE, v_BKTE, block_mask=mask, scale=scale, enable_gqa=enable_gqa, return_aux=AuxRequest(lse=True)
    )
    return out_BHSE * torch.sigmoid(aux.lse - sinks_H[:, None])[..., None].to(out_BHSE.dtype)


@cache
def _compiled_flex_attention() -> Any:
    """Compile FlexAttention. Without compilation it has no kernel and computes all scores, also the masked ones."""
    return torch.compile(flex_attention, dynamic=False)
