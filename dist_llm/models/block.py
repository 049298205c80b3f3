"""One transformer layer: attention and feed-forward, each with a residual connection.

Shape suffixes: B batch, S tokens, T encoder tokens, D d_model.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dist_llm.config.model_section import ModelConfig
from dist_llm.models.attention import Attention, CrossAttention, KVCache, RotaryCosSin
from dist_llm.models.attention_mask import AttentionMask
from dist_llm.models.build_norm import build_norm
from dist_llm.models.cost import Cost
from dist_llm.models.feedforward import FeedForward
from dist_llm.param_spec import ParamSpec, norm_specs


class Block(nn.Module):
    """A pre-norm block, x + f(norm(x)), or a post-norm block, norm(x + f(x)). Xiong et al. 2020 compare them."""

    def __init__(self, config: ModelConfig, layer: int, has_cross_attention: bool = False) -> None:
        super().__init__()
        self.is_pre_norm = config.norm_order == "pre"
        self.norm_attention = build_norm(config)
        self.attention = Attention(config, layer)
        self.norm_cross = build_norm(config) if has_cross_attention else None
        self.cross = CrossAttention(config, layer) if has_cross_attention else None
        self.norm_feedforward = build_norm(config)
        self.feedforward = FeedForward(config, layer)
        self.dropout = nn.Dropout(config.dropout)

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        """Return the cost of self-attention and feed-forward; cross-attention depends on the encoder input."""
        return Attention.cost(config) + FeedForward.cost(config)

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the parameters of the norms. The sublayers describe their own."""
        names = ("norm_attention", "norm_cross", "norm_feedforward")
        return {key: spec for name in names for key, spec in norm_specs(name, getattr(self, name)).items()}

    def forward(
        self,
        x_BSD: Tensor,
        rotation: RotaryCosSin | None,
        mask: AttentionMask,
        cache: KVCache | None = None,
        depth_scale_BS1: Tensor | None = None,
        memory_BTD: Tensor | None = None,
        memory_mask: AttentionMask | None = None,
    ) -> Tensor:
        """[B, S, D] -> [B, S, D].

        `depth_scale_BS1`, [B, 1 or S, 1], scales the outputs of the sublayers, for stochastic depth. `memory_BTD` is
        the output of the encoder.
        """

        def apply_sublayer(x_BSD: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
            out_BSD = self.dropout(sublayer(cast_to_autocast_dtype(norm(x_BSD) if self.is_pre_norm else x_BSD)))
            x_BSD = x_BSD + (out_BSD if depth_scale_BS1 is None else out_BSD * depth_scale_BS1.to(out_BSD.dtype))
            return x_BSD if self.is_pre_norm else norm(x_BSD)

        x_BSD = apply_sublayer(x_BSD, self.norm_attention, lambda x: self.attention(x, rotation, mask, cache))
        if (cross := self.cross) is not None:
            assert self.norm_cross is not None
            x_BSD = apply_sublayer(x_BSD, self.norm_cross, lambda x: cross(x, memory_BTD, memory_mask, cache))
        return apply_sublayer(x_BSD, self.norm_feedforward, self.feedforward)


def cast_to_autocast_dtype(x: Tensor) -> Tensor:
    """Cast to the autocast dtype once, instead of once per consumer (q, k, v)."""
    device_type = x.device.type
    return x.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else x
