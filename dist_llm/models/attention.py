"""Grouped-query self-attention, and the one place that picks its kernel."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

from dist_llm.config.schema import ModelConfig
from dist_llm.models.positions import rotate
from dist_llm.models.visibility import Visibility

# B batch  S queries  T keys  D d_model  H query heads  K key-value heads  E head dim

Rotation = tuple[Tensor, Tensor]  # cos and sin, each [S, E/2] or [B, S, E/2]


@dataclass
class KVCache:
    """Keys and values of all tokens seen so far, per layer, for generation."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return next(iter(self.layers.values()))[0].shape[1] if self.layers else 0

    def append(self, layer: int, k_BSKE: Tensor, v_BSKE: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys and values; return those of all tokens, [B, T, K, E]."""
        if layer in self.layers:
            k_old, v_old = self.layers[layer]
            k_BSKE, v_BSKE = torch.cat((k_old, k_BSKE), dim=1), torch.cat((v_old, v_BSKE), dim=1)
        self.layers[layer] = (k_BSKE, v_BSKE)
        return k_BSKE, v_BSKE


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023). `visible` says who may look at whom."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        self.q = nn.Linear(config.d_model, config.n_heads * config.head_dim, bias=config.bias)
        self.k = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=config.bias)
        self.v = nn.Linear(config.d_model, config.n_kv_heads * config.head_dim, bias=config.bias)
        self.kernel = AttentionKernel(config.dropout)
        self.out = nn.Linear(config.n_heads * config.head_dim, config.d_model, bias=config.bias)

    def forward(
        self, x_BSD: Tensor, rotation: Rotation | None, visible: Visibility, cache: KVCache | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        # -1, not n_heads: a tensor-parallel rank holds only its own heads.
        q_BSHE = self.q(x_BSD).unflatten(-1, (-1, self.head_dim))
        k_BSKE = self.k(x_BSD).unflatten(-1, (-1, self.head_dim))
        v_BSKE = self.v(x_BSD).unflatten(-1, (-1, self.head_dim))
        if rotation is not None:
            q_BSHE, k_BSKE = rotate(q_BSHE, *rotation), rotate(k_BSKE, *rotation)
        if cache is not None:
            k_BSKE, v_BSKE = cache.append(self.layer, k_BSKE, v_BSKE)
        return self.out(self.kernel(q_BSHE, k_BSKE, v_BSKE, visible).flatten(-2))


class AttentionKernel(nn.Module):
    """Softmax attention as a module of its own, so that a layout can put another in its place."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, q_BSHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, visible: Visibility) -> Tensor:
        """[B, S, H, E] and keys and values of T tokens -> [B, S, H, E]."""
        return attend(q_BSHE, k_BTKE, v_BTKE, visible, self.dropout if self.training else 0.0)


def attend(q_BSHE: Tensor, k_BTKE: Tensor, v_BTKE: Tensor, visible: Visibility, dropout: float) -> Tensor:
    """Softmax attention, [B, S, H, E]; where S < T the queries are the last S of the T tokens."""
    S, T = q_BSHE.shape[1], k_BTKE.shape[1]
    # One query sees all keys: no mask. A square is the kernels' fast path. Else the mask is aligned to the end.
    mask = None
    if visible.causal and 1 < S < T:
        with _disable_current_modes():  # the mask is a tensor subclass, which selective recomputation's mode refuses
            mask = causal_lower_right(S, T)
    out_BHSE = F.scaled_dot_product_attention(
        q_BSHE.transpose(1, 2),
        k_BTKE.transpose(1, 2),
        v_BTKE.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=visible.causal and S == T and S > 1,
        enable_gqa=q_BSHE.shape[2] != k_BTKE.shape[2],
    )
    return out_BHSE.transpose(1, 2)
