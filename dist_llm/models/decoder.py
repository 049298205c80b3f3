"""The decoder: embedding, blocks, head. GPT-2 and Llama are two settings of it.

The model knows nothing of ranks: layouts are laid over it by `parallel`, from outside.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.check import round_up
from dist_llm.config.schema import ModelConfig
from dist_llm.losses.cross_entropy import CrossEntropy
from dist_llm.models.attention import KVCache
from dist_llm.models.block import Block
from dist_llm.models.norm import build_norm
from dist_llm.models.positions import rotary_angles, sinusoids
from dist_llm.models.visibility import CAUSAL, Visibility


class Embedding(nn.Module):
    """Token ids -> vectors, with learned or sinusoidal positions added where the model has them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.sinusoidal = config.positions == "sinusoidal"
        self.tokens = nn.Embedding(round_up(config.vocab_size, config.vocab_multiple), config.d_model)
        self.positions = nn.Embedding(config.max_seq_len, config.d_model) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens_BS: Tensor, positions_S: Tensor) -> Tensor:
        """[B, S] -> [B, S, D]."""
        x_BSD = self.tokens(tokens_BS)
        if self.positions is not None:
            x_BSD = x_BSD + self.positions(positions_S)
        elif self.sinusoidal:
            x_BSD = x_BSD + sinusoids(positions_S, x_BSD.shape[-1]).to(x_BSD.dtype)
        return self.dropout(x_BSD)


class Head(nn.Module):
    """Final norm, then logits; or, given targets, their summed loss."""

    def __init__(self, config: ModelConfig, loss: CrossEntropy) -> None:
        super().__init__()
        self.vocab_size, self.loss = config.vocab_size, loss
        # In post-norm every block has already ended with a norm.
        self.norm = build_norm(config) if config.norm_order == "pre" else nn.Identity()
        rows = round_up(config.vocab_size, config.vocab_multiple)
        self.out = None if config.tie_embeddings else nn.Linear(config.d_model, rows, bias=False)

    def forward(self, x_BSD: Tensor, tied_VD: Tensor, targets_BS: Tensor | None) -> Tensor:
        """[B, S, D] -> logits [B, S, V], or the scalar sum of losses. Padding rows of the head are left out."""
        weight_VD = tied_VD if self.out is None else self.out.weight
        logits_BSV = F.linear(self.norm(x_BSD), weight_VD[: self.vocab_size])
        return logits_BSV if targets_BS is None else self.loss(logits_BSV, targets_BS)


class Decoder(nn.Module):
    """A decoder-only transformer, built from the `model` section of a resolved config."""

    def __init__(self, config: ModelConfig, loss: CrossEntropy | None = None) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config)
        # By name and not by place: a pipeline stage holds some of them under their own names.
        self.blocks = nn.ModuleDict({str(layer): Block(config, layer) for layer in range(config.n_layers)})
        self.head = Head(config, loss or CrossEntropy())

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        visible: Visibility = CAUSAL,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Logits [B, S, V]; or, given targets, the sum of their losses, a scalar.

        With a cache the tokens follow those that it holds.
        """
        start = cache.length if cache else 0
        positions_S = torch.arange(start, start + tokens_BS.shape[1], device=tokens_BS.device)
        rotation = None
        if self.config.positions == "rope":
            angles_SF = rotary_angles(positions_S, self.config.head_dim, self.config.rope_theta)
            rotation = angles_SF.cos(), angles_SF.sin()
        x_BSD = self.embed(tokens_BS, positions_S)
        for block in self.blocks.values():
            x_BSD = block(x_BSD, rotation, visible, cache)
        return self.head(x_BSD, self.embed.tokens.weight, targets_BS)
