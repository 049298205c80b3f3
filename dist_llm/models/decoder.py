"""Single-stack transformers: embedding, blocks, head. GPT-2, Llama and BERT are settings of it.

The batch's attention mask makes it a decoder or an encoder. The model does not depend on ranks: `parallel` shards and
wraps it from outside. A pipeline stage is a model with some of its parts removed; it runs what it has and returns the
activations.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.derive import round_up
from dist_llm.config.model_section import ModelConfig
from dist_llm.losses.cross_entropy import CrossEntropy, LossTerms
from dist_llm.losses.fused_linear_cross_entropy import VocabShard, linear_cross_entropy
from dist_llm.models.attention import KVCache, RotaryCosSin, materialize_mask
from dist_llm.models.attention_mask import CAUSAL, AttentionMask
from dist_llm.models.block import Block
from dist_llm.models.build_norm import build_norm
from dist_llm.models.feedforward import ACTIVATIONS
from dist_llm.models.positional_encoding import RelativeBias, SinusoidalEncoding, rotary_angles
from dist_llm.models.stochastic_depth import stochastic_depth_scale


class Embedding(nn.Module):
    """Token ids -> vectors, plus learned or sinusoidal positions if the model has them."""

    def __init__(self, config: ModelConfig, tokens: nn.Embedding | None = None) -> None:
        super().__init__()
        # An encoder-decoder shares one token embedding.
        self.tokens = tokens or nn.Embedding(round_up(config.vocab_size, config.vocab_multiple), config.d_model)
        self.positions: nn.Module | None = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_seq_len, config.d_model)
        elif config.positions == "sinusoidal":
            self.positions = SinusoidalEncoding(config.d_model)
        self.norm = build_norm(config) if config.norm_embedding else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens_BS: Tensor, positions_BS: Tensor) -> Tensor:
        """Ids and positions [B, S] (positions may be [S]) -> [B, S, D]."""
        x_BSD = self.tokens(tokens_BS)
        if self.positions is not None:
            x_BSD = x_BSD + self.positions(positions_BS).to(x_BSD.dtype)
        return self.dropout(x_BSD if self.norm is None else self.norm(x_BSD))


class Head(nn.Module):
    """Final norm and logits; or, given targets, their loss summed per sequence.

    Evaluation uses the plain cross-entropy, whatever the training loss is. `terms` collects the terms of a training
    loss.
    """

    def __init__(self, config: ModelConfig, loss: CrossEntropy) -> None:
        super().__init__()
        self.vocab_size, self.softcap, self.loss = config.vocab_size, config.logit_cap, loss
        self.terms = None if loss.is_plain else LossTerms()
        # With post-norm every block already ends with a norm.
        self.norm = build_norm(config) if config.norm_order == "pre" else nn.Identity()
        rows = round_up(config.vocab_size, config.vocab_multiple)
        self.dense = MaskedDense(config) if config.head == "mlm" else None
        self.bias = nn.Parameter(torch.empty(rows)) if config.head == "mlm" else None
        self.out = None if config.tie_embeddings else nn.Linear(config.d_model, rows, bias=False)

    def forward(self, x_BSD: Tensor, tied_VD: Tensor | None, targets_BS: Tensor | None) -> Tensor:
        """[B, S, D] -> logits [B, S, V], or the losses' sums [B]. The padding rows of the head are left out."""
        weight_VD = tied_VD if self.out is None else self.out.weight
        assert weight_VD is not None
        if targets_BS is not None:
            vocab_shard = VocabShard(self.vocab_size, 0, self.vocab_size)
            loss, terms = self.loss_for_mode()
            return linear_cross_entropy(
                self.pre_logits(x_BSD), weight_VD, self.bias, targets_BS, loss, self.softcap, vocab_shard, terms
            )
        bias_V = None if self.bias is None else self.bias[: self.vocab_size]
        return softcap(F.linear(self.pre_logits(x_BSD), weight_VD[: self.vocab_size], bias_V), self.softcap)

    def loss_for_mode(self) -> tuple[CrossEntropy, LossTerms | None]:
        """Return the loss of training or evaluation, and the collector of its terms."""
        return (self.loss, self.terms) if self.training else (CrossEntropy(), None)

    def pre_logits(self, x_BSD: Tensor) -> Tensor:
        """Return the vectors that are multiplied by the vocabulary matrix, [B, S, D]."""
        x_BSD = self.norm(x_BSD)
        return x_BSD if self.dense is None else self.dense(x_BSD)


class MaskedDense(nn.Module):
    """BERT's layer before its logits (Devlin et al. 2019 and its code)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.activation = ACTIVATIONS[config.activation]
        self.norm = build_norm(config)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        return self.norm(self.activation(self.linear(x_BSD)))


def softcap(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap): logits are bounded by `cap` (Gemma Team 2024, section 2)."""
    return cap * torch.tanh(logits / cap) if cap else logits


class Decoder(nn.Module):
    """A single-stack transformer, built from the `model` section of a resolved config.

    `is_first_stage` and `is_last_stage` are both true in a full model; see `trim_to_stage`.
    """

    def __init__(self, config: ModelConfig, loss: CrossEntropy | None = None) -> None:
        super().__init__()
        self.config = config
        self.is_first_stage = self.is_last_stage = True
        self.embed: Embedding | None = Embedding(config)
        self.relative: RelativeBias | None = None
        if config.positions == "relative":
            self.relative = RelativeBias(config, bidirectional=config.architecture == "encoder")
        # Keyed by layer number, because a pipeline stage keeps the names of the full model.
        self.blocks = nn.ModuleDict({str(layer): Block(config, layer) for layer in range(config.n_layers)})
        self.head: Head | None = Head(config, loss or CrossEntropy())

    def trim_to_stage(self, layers: range, first: bool, last: bool) -> None:
        """Remove all but these blocks; remove the embedding and the head unless this is the `first` or `last` stage.

        The last stage keeps the token embedding if the head is tied to it.
        """
        self.is_first_stage, self.is_last_stage = first, last
        for name in [name for name in self.blocks if int(name) not in layers]:
            del self.blocks[name]
        self._trim_embedding(embeds=first, projects=last)

    def _trim_embedding(self, embeds: bool, projects: bool) -> None:
        """Remove the embedding, unless this stage embeds tokens or projects on tied embeddings; remove an unused
        head."""
        if not embeds and self.embed is not None:
            self.embed.positions = self.embed.norm = None
            self.embed = self.embed if projects and self.config.tie_embeddings else None
        if not projects:
            self.head = None

    def forward(
        self,
        inputs: Tensor,
        targets_BS: Tensor | None = None,
        mask: AttentionMask = CAUSAL,
        cache: KVCache | None = None,
        positions_BS: Tensor | None = None,
        sample_hash_B: Tensor | None = None,
    ) -> Tensor:
        """Token ids [B, S] -> logits [B, S, V]; or, given targets, their losses' sums per sequence, [B].

        With a cache the tokens follow those in the cache. Positions default to 0, 1, 2, ..., or continue from the
        cache. After the first stage `inputs` are activations [B, S, D]; before the last stage the result is.
        `sample_hash_B` provides the random bits of stochastic depth.
        """
        past = cache.length if cache else 0
        if positions_BS is None:
            positions_BS = torch.arange(past, past + inputs.shape[1], device=inputs.device)
        mask = self._materialize_mask(mask, self.relative, (len(inputs), positions_BS.shape[-1]), past, inputs.device)
        x_BSD = self.embed(inputs, positions_BS) if self.embed is not None and self.is_first_stage else inputs
        rotation = self._rotary_cos_sin(positions_BS)
        for layer, block in self._iter_blocks():
            x_BSD = block(x_BSD, rotation, mask, cache, self._depth_scale(sample_hash_B, layer))
        return x_BSD if self.head is None else self._apply_head(x_BSD, targets_BS)

    def _iter_blocks(self) -> Iterator[tuple[int, nn.Module]]:
        return ((int(name), block) for name, block in self.blocks.items())

    def _apply_head(self, x_BSD: Tensor, targets_BS: Tensor | None) -> Tensor:
        assert self.head is not None
        tied_VD = self.embed.tokens.weight if self.embed is not None and self.config.tie_embeddings else None
        return self.head(x_BSD, tied_VD, targets_BS)

    def _rotary_cos_sin(self, positions_BS: Tensor) -> RotaryCosSin | None:
        if self.config.positions != "rope":
            return None
        angles = rotary_angles(positions_BS, self.config.head_dim, self.config.rope_theta)
        return angles.cos(), angles.sin()

    def _materialize_mask(
        self, mask: AttentionMask, relative: RelativeBias | None, rows: tuple[int, int], past: int, device: torch.device
    ) -> AttentionMask:
        """Compute the mask of all layers once."""
        B, S = rows
        T = mask.num_keys or past + S
        bias_HST = None
        if relative is not None:
            keys_T = torch.arange(T, device=device)
            bias_HST = relative(
                keys_T[T - S :] if mask.query_positions_BS is None else mask.query_positions_BS[0], keys_T
            )
        return materialize_mask(mask, (B, S, T), device, self._needs_dense_mask, bias_HST)

    @property
    def _needs_dense_mask(self) -> bool:
        """Whether FlexAttention cannot be used: it supports neither dropout nor heads below 16 dimensions."""
        return (self.training and self.config.dropout > 0) or self.config.head_dim < 16

    def _depth_scale(self, sample_hash_B: Tensor | None, layer: int) -> Tensor | None:
        if not (self.training and self.config.stochastic_depth) or sample_hash_B is None:
            return None
        layers = self.config.n_layers + self.config.n_encoder_layers
        return stochastic_depth_scale(sample_hash_B, layer, self.config.stochastic_depth * (layer + 1) / layers)[
            :, None, None
        ]
