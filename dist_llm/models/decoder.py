"""The decoder: embedding, blocks, head. GPT-2 and Llama are two settings of it.

The model knows nothing of ranks: layouts are laid over it by `parallel`, from outside. It survives
being cut: a part of it runs what it has and hands on what comes out.
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
from dist_llm.models.positions import Sinusoids, rotary_angles
from dist_llm.models.visibility import CAUSAL, Visibility


class Embedding(nn.Module):
    """Token ids -> vectors, with learned or sinusoidal positions added where the model has them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(round_up(config.vocab_size, config.vocab_multiple), config.d_model)
        self.positions: nn.Module | None = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        elif config.positions == "sinusoidal":
            self.positions = Sinusoids(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Ids and positions [B, S] (positions may be [S]) -> [B, S, D]."""
        x_BSD = self.tokens(tokens_BS)
        if self.positions is not None:
            x_BSD = x_BSD + self.positions(positions_BS).to(x_BSD.dtype)
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

    def forward(self, x_BSD: Tensor, tied_VD: Tensor | None, targets_BS: Tensor | None) -> Tensor:
        """[B, S, D] -> logits [B, S, V], or the scalar sum of losses. Padding rows of the head are left out."""
        weight_VD = tied_VD if self.out is None else self.out.weight
        assert weight_VD is not None
        logits_BSV = F.linear(self.norm(x_BSD), weight_VD[: self.vocab_size])
        return logits_BSV if targets_BS is None else self.loss(logits_BSV, targets_BS)


class Decoder(nn.Module):
    """A decoder-only transformer, built from the `model` section of a resolved config.

    `first` and `last` say which ends it has: a whole model has both, see `keep`.
    """

    def __init__(self, config: ModelConfig, loss: CrossEntropy | None = None) -> None:
        super().__init__()
        self.config = config
        self.first = self.last = True
        self.embed: Embedding | None = Embedding(config)
        # By name and not by place: a part of the model holds some of them under their own names.
        self.blocks = nn.ModuleDict({str(layer): Block(config, layer) for layer in range(config.n_layers)})
        self.head: nn.Module | None = Head(config, loss or CrossEntropy())

    def keep(self, layers: range, first: bool, last: bool) -> None:
        """Drop all but these blocks and ends. A tied head keeps the embedding whose weight it uses."""
        self.first, self.last = first, last
        for layer in set(range(self.config.n_layers)) - set(layers):
            del self.blocks[str(layer)]
        if not first and self.embed is not None:
            self.embed.positions = None
            self.embed = self.embed if last and self.config.tie_embeddings else None
        if not last:
            self.head = None

    def forward(
        self,
        inputs: Tensor,
        targets_BS: Tensor | None = None,
        visible: Visibility = CAUSAL,
        cache: KVCache | None = None,
        positions_BS: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, S] -> logits [B, S, V]; or, given targets, the sum of their losses, a scalar.

        With a cache the tokens follow those that it holds. Positions default to 0, 1, 2, ... (or go
        on from the cache). Without the first end `inputs` are activations [B, S, D]; without the
        last the result is.
        """
        if positions_BS is None:
            start = cache.length if cache else 0
            positions_BS = torch.arange(start, start + inputs.shape[1], device=inputs.device)
        rotation = None
        if self.config.positions == "rope":
            angles = rotary_angles(positions_BS, self.config.head_dim, self.config.rope_theta)
            rotation = angles.cos(), angles.sin()
        x_BSD = self.embed(inputs, positions_BS) if self.embed is not None and self.first else inputs
        for block in self.blocks.values():
            x_BSD = block(x_BSD, rotation, visible, cache)
        if self.head is None:
            return x_BSD
        tied_VD = self.embed.tokens.weight if self.embed is not None and self.config.tie_embeddings else None
        return self.head(x_BSD, tied_VD, targets_BS)
