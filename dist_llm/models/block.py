"""One layer: attention and feed-forward, each a residual step."""

from torch import Tensor, nn

from dist_llm.config.schema import ModelConfig
from dist_llm.models.attention import Attention, KVCache, Rotation
from dist_llm.models.feedforward import FeedForward
from dist_llm.models.norm import build_norm
from dist_llm.models.visibility import Visibility


class Block(nn.Module):
    """Pre-norm: x + f(norm(x)). Post-norm: norm(x + f(x)) (Xiong et al. 2020 compare them)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.pre = config.norm_order == "pre"
        self.norm_attention = build_norm(config)
        self.attention = Attention(config, layer)
        self.norm_feedforward = build_norm(config)
        self.feedforward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x_BSD: Tensor, rotation: Rotation | None, visible: Visibility, cache: KVCache | None = None
    ) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        if self.pre:
            x_BSD = x_BSD + self.dropout(self.attention(self.norm_attention(x_BSD), rotation, visible, cache))
            return x_BSD + self.dropout(self.feedforward(self.norm_feedforward(x_BSD)))
        x_BSD = self.norm_attention(x_BSD + self.dropout(self.attention(x_BSD, rotation, visible, cache)))
        return self.norm_feedforward(x_BSD + self.dropout(self.feedforward(x_BSD)))
