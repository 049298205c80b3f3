"""One transformer layer: attention and feed-forward, each with a residual connection.

Shape suffixes: B batch, S tokens, T encoder tokens, D d_model.
"""

from collections.abc import Callable

from torch import Tensor, nn

from dist_llm.config.model_section import ModelConfig
from dist_llm.config.parametrization import resolve_residual_scale
from dist_llm.config.registered_classes import load_registered_class
from dist_llm.models.attention import Attention, CrossAttention
from dist_llm.models.autocast import cast_to_autocast_dtype
from dist_llm.models.cost import Cost
from dist_llm.models.feedforward import DenseFeedForward, FeedForward
from dist_llm.models.layer_context import LayerContext
from dist_llm.models.mixer import get_mixer_class
from dist_llm.models.moe import MoE
from dist_llm.models.norm import build_norm
from dist_llm.param_spec import ParamSpec, norm_specs


class Block(nn.Module):
    """Attention and feed-forward, each with norms and a residual connection, in the order of `model.norm_order`:

    pre: x + f(norm(x)); post: norm(x + f(x)) (Xiong et al. 2020 compare both); sandwich: x + norm(f(norm(x))) (Ding et
    al. 2021); reordered: x + norm(f(x)) (OLMo 2). With `model.parallel_residual`, attention and feed-forward both read
    the input of the block: x + attention(norm(x)) + feedforward(norm(x)).
    """

    def __init__(self, config: ModelConfig, layer: int, has_cross_attention: bool = False) -> None:
        super().__init__()
        self.config = config
        self.residual_scale = resolve_residual_scale(config)
        self.normalizes_input = config.norm_order in ("pre", "sandwich")
        self.norm_attention = build_norm(config)
        mixer = get_mixer_class(config.mixer)(config, layer)
        self.attention = mixer if isinstance(mixer, Attention) else None
        self.mixer = None if isinstance(mixer, Attention) else mixer
        self.norm_cross = build_norm(config) if has_cross_attention else None
        self.cross = CrossAttention(config, layer) if has_cross_attention else None
        self.norm_feedforward = build_norm(config) if config.parallel_residual != "one_norm" else None
        self.feedforward = get_feedforward_class(config.feedforward.name)(config, layer)
        is_sandwich = config.norm_order == "sandwich"
        self.norm_attention_out = build_norm(config) if is_sandwich else None
        self.norm_feedforward_out = build_norm(config) if is_sandwich else None
        self.dropout = nn.Dropout(config.dropout)

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        """Return the cost of the mixer and the feed-forward layer; cross-attention depends on the encoder input."""
        feedforward_class = get_feedforward_class(config.feedforward.name)
        return get_mixer_class(config.mixer).cost(config) + feedforward_class.cost(config)

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the parameters of the norms. The sublayers describe their own."""
        names = ("norm_attention", "norm_attention_out", "norm_cross", "norm_feedforward", "norm_feedforward_out")
        return {key: spec for name in names for key, spec in norm_specs(name, getattr(self, name)).items()}

    def forward(
        self,
        x_BSD: Tensor,
        context: LayerContext,
        memory_BTD: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, S, D] -> ([B, S, D], packed `RouterStats` of a mixture of experts or None).

        `memory_BTD` is the output of the encoder. The statistics are an output, because a recomputed forward would
        repeat any side effect.
        """
        depth_scale_BS1 = context.depth_scale_BS1
        router_stats: Tensor | None = None

        def scale_output(out_BSD: Tensor) -> Tensor:
            out_BSD = self.dropout(out_BSD)
            if self.residual_scale != 1:
                out_BSD = out_BSD * self.residual_scale
            return out_BSD if depth_scale_BS1 is None else out_BSD * depth_scale_BS1.to(out_BSD.dtype)

        def attend(x_BSD: Tensor) -> Tensor:
            mixer = self.mixer if self.attention is None else self.attention
            assert mixer is not None
            out_BSD: Tensor = mixer(x_BSD, context)
            return out_BSD

        def feed_forward(x_BSD: Tensor) -> Tensor:
            if isinstance(self.feedforward, FeedForward):
                return self.feedforward(x_BSD)
            nonlocal router_stats
            out_BSD, router_stats = self.feedforward(x_BSD, context.router_loss_scale)
            return out_BSD

        if self.config.parallel_residual != "off":
            normed_BSD = cast_to_autocast_dtype(self.norm_attention(x_BSD))
            feedforward_in_BSD = normed_BSD
            if self.norm_feedforward is not None:
                feedforward_in_BSD = cast_to_autocast_dtype(self.norm_feedforward(x_BSD))
            x_BSD = x_BSD + scale_output(attend(normed_BSD)) + scale_output(feed_forward(feedforward_in_BSD))
            return x_BSD, router_stats

        def apply_sublayer(
            x_BSD: Tensor, norm: nn.Module, sublayer: Callable[[Tensor], Tensor], out_norm: nn.Module | None = None
        ) -> Tensor:
            out_BSD = sublayer(cast_to_autocast_dtype(norm(x_BSD) if self.normalizes_input else x_BSD))
            if self.config.norm_order == "reordered":
                out_norm = norm
            x_BSD = x_BSD + scale_output(out_BSD if out_norm is None else out_norm(out_BSD))
            return norm(x_BSD) if self.config.norm_order == "post" else x_BSD

        x_BSD = apply_sublayer(x_BSD, self.norm_attention, attend, self.norm_attention_out)
        if (cross := self.cross) is not None:
            assert self.norm_cross is not None
            x_BSD = apply_sublayer(x_BSD, self.norm_cross, lambda x: cross(x, memory_BTD, context))
        assert self.norm_feedforward is not None
        x_BSD = apply_sublayer(x_BSD, self.norm_feedforward, feed_forward, self.norm_feedforward_out)
        return x_BSD, router_stats


def get_feedforward_class(name: str) -> type[FeedForward | MoE]:
    """Return the class of a feed-forward layer. Raises ConfigError if no installed package registers it."""
    built_in: dict[str, type[FeedForward | MoE]] = {"dense": DenseFeedForward, "moe": MoE}
    if name in built_in:
        return built_in[name]
    feedforward: type[FeedForward] = load_registered_class("dist_llm.feedforwards", name)
    return feedforward
